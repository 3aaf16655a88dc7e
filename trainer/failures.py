"""What a run says when it cannot go on: the step, the rank, and what to do."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from .checkpoints import manifest

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TrainingFailure(RuntimeError):
    """A run that cannot go on."""


@contextlib.contextmanager
def explained(trainer: Any) -> Iterator[None]:
    """Errors of a run with the step, the rank and a remedy: in their message where their cause is known, else in the
    log. Other ranks then fail for want of an answer; they say whose, and the cause."""
    words = LastWords(trainer.args.process_index, trainer.args.world_size)
    try:
        yield
    except Exception as error:
        if is_collective(error):
            raise TrainingFailure(_lost(trainer, error, words)) from error
        if should_reduce_batch_size(error) or isinstance(error, torch.OutOfMemoryError):
            text = f"{where(trainer)}: out of memory. {_less_memory(trainer)} {how_to_resume(trainer)}"
            words.leave(text)
            raise torch.OutOfMemoryError(text) from error
        if isinstance(error, (TrainingFailure, manifest.ResumeError)):
            words.leave(str(error))
            raise
        words.leave(f"{where(trainer)}: {type(error).__name__}: {error}")
        logger.error("%s: the run cannot go on. %s", where(trainer), how_to_resume(trainer))
        raise


@contextlib.contextmanager
def reading(trainer: Any) -> Iterator[None]:
    """Errors while batches are read, but for what the data itself explains by a ValueError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (ValueError, TrainingFailure)) or is_collective(error):
            raise
        raise TrainingFailure(
            f"{where(trainer)}: the data could not be read: {type(error).__name__}: {error}. Look whether it can be "
            f"reached from this machine and whether these rows are whole. {how_to_resume(trainer)}"
        ) from error


def on_every_rank(make: Callable[[], T]) -> list[T]:
    """What `make` gives on every rank, small and picklable. All have to call it; `make` itself must not communicate.

    Raises:
        Exception: `make`'s own, and on all other ranks, which would else wait for this one until ddp_timeout,
            ValueError or TrainingFailure with its text.
    """
    made, failure, told = None, None, None
    try:
        made = make()
    except Exception as error:
        mistake, known = isinstance(error, ValueError), isinstance(error, (ValueError, TrainingFailure))
        failure, told = error, (mistake, str(error) if known else f"{type(error).__name__}: {error}")
    answers = gather_object([(made, told)])
    if failure is not None:
        raise failure
    for rank, (_, told) in enumerate(answers):
        if told is not None:
            mistake, text = told
            raise (ValueError if mistake else TrainingFailure)(f"rank {rank} has failed: {text}")
    return [made for made, _ in answers]


class LastWords:
    """What the ranks of a run tell each other when it fails, through torch's key-value store."""

    _runs = itertools.count()  # every process makes the same ones

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, run = rank, world_size, next(self._runs)
        self.causes_key, self.alive_key = f"linear_llama3/causes/{run}", f"linear_llama3/alive/{run}"

    def leave(self, cause: str = "") -> None:
        """Tells that this rank is alive, and why it ends, if it knows."""
        if self.world_size > 1:
            with contextlib.suppress(RuntimeError):  # the store may have ended with its process
                store: Any = dist.distributed_c10d._get_default_store()
                store.append(self.causes_key, f"{cause}\n" if cause else "")
                store.append(self.alive_key, f"{self.rank} ")

    def hear(self, *, seconds: float = 3.0) -> tuple[list[int], str]:
        """The ranks that leave no word within some time, and the causes that others know.

        Raises:
            RuntimeError: the store has ended with its process (rank 0's, or torchrun's).
        """
        alive, causes, deadline = {self.rank}, "", time.monotonic() + seconds
        store: Any = dist.distributed_c10d._get_default_store()
        while len(alive) < self.world_size and time.monotonic() < deadline:
            time.sleep(0.1)
            if store.check([self.alive_key]):
                alive |= {int(rank) for rank in store.get(self.alive_key).split()}
        if store.check([self.causes_key]):
            causes = store.get(self.causes_key).decode().strip()
        return sorted(set(range(self.world_size)) - alive), causes


@contextlib.contextmanager
def saving(trainer: Any, folder: Path) -> Iterator[None]:
    """Errors while a checkpoint is written."""
    try:
        yield
    except Exception as error:
        if is_collective(error):
            raise
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        raise TrainingFailure(
            f"step {trainer.state.global_step}, {rank(trainer)}: {folder} could not be written: {error} "
            f"({free / 2**30:.2f} GiB are free there). Make room, or keep fewer checkpoints by save_total_limit. "
            f"{how_to_resume(trainer)}"
        ) from error


def where(trainer: Any) -> str:
    """The step that a process is in, and its rank."""
    return f"step {trainer.state.global_step + 1}, {rank(trainer)}"


def rank(trainer: Any) -> str:
    return f"rank {trainer.args.process_index} of {trainer.args.world_size}"


def how_to_resume(trainer: Any) -> str:
    newest = manifest.newest(Path(trainer.args.output_dir))
    if newest is None:
        return "There is no whole checkpoint to resume from."
    return f"{newest} is whole: resume_from_checkpoint=True goes on from there."


def is_collective(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _lost(trainer: Any, error: Exception, words: LastWords) -> str:
    """Whose answer is missing in a collective, why, and what to do."""
    words.leave()
    try:
        silent, causes = words.hear()
    except RuntimeError:
        text = "another rank has ended, and with rank 0 what ranks tell each other; its own output says why."
        return f"{where(trainer)}: {text} {how_to_resume(trainer)}"
    if causes:
        return f"{where(trainer)}: another rank has failed: {causes}"  # which says how to resume
    ranks = f"rank {', '.join(map(str, silent))}" if silent else "another rank"
    if "timed out" in str(error).lower() or "timeout" in str(error).lower():
        limit = f"ddp_timeout = {trainer.args.ddp_timeout} s"
        text = f"{ranks} did not answer within {limit}. It hangs, or takes longer: raise ddp_timeout."
    else:
        text = f"{ranks} has ended without a word, as if killed, perhaps because the machine ran out of memory: "
        text += "`linear-llama3 train RECIPE.yaml --dry-run` computes the memory that a rank needs."
    return f"{where(trainer)}: {text} {how_to_resume(trainer)}"


def _less_memory(trainer: Any) -> str:
    """What the step needed, and the measures that need less, the cheapest first."""
    if getattr(trainer, "adapts", False):
        return (
            "A plan keeps to the profile's memory: lower `device` under `bytes` in planner_profile, or set "
            "gradient_checkpointing=True with a profile of its own."
        )
    args, context = trainer.args, trainer.sequence_parallel_context
    degree = 1 if context is None else context.world_size
    rows, length = trainer.batch_shape or (args.per_device_train_batch_size, None)
    measures = []
    if rows > 1:
        accumulation = args.gradient_accumulation_steps * rows
        measures.append(f"per_device_train_batch_size=1 with gradient_accumulation_steps={accumulation}")
    if not args.gradient_checkpointing:
        measures.append("gradient_checkpointing=True")
    larger = [n for n in range(degree + 1, args.world_size + 1) if args.world_size % n == 0]
    next_degree = larger[0] if larger else 2 * degree
    step = f"sequence_parallel_size={next_degree}"
    if not larger:
        step += f" on {2 * args.world_size} processes"
    elif next_degree % degree == 0:  # so that a step still takes as many rows
        step += f" with gradient_accumulation_steps={args.gradient_accumulation_steps * next_degree // degree}"
    if length is None:
        return f"Use {', or '.join([*measures, step])}."
    measures.append(f"{step}, {-(-length // next_degree)} tokens a rank")
    return (
        f"The batch has {rows} x {length} tokens over {degree} ranks, {-(-length // degree)} of every row on each. "
        f"Use {', or '.join(measures)}."
    )


class FiniteCheck:
    """Stops a run at a loss or gradient that is not finite, before it reaches the parameters.

    The gradient's norm is the same on all ranks and not finite if any rank's gradient is not, so only a failing run
    has to ask whose loss it was.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.active = trainer, not trainer.args.logging_nan_inf_filter
        self.losses: list[Tensor] = []  # of this process, since the last optimizer step
        self.targets: Tensor | int | None = None  # number of targets of the step, by which losses are divided

    def note(self, loss: Tensor, targets: Tensor | int | None) -> None:
        if self.active:
            self.losses.append(loss)
            self.targets = targets

    def check_norm(self, norm: Tensor | float | None) -> None:
        losses, self.losses = self.losses, []
        if not self.active or norm is None or torch.isfinite(torch.as_tensor(norm)).all():
            return
        self._check_targets(losses[0].device)
        broken = (~torch.isfinite(torch.stack(losses))).unsqueeze(0)  # [1, micro-batches]
        by_rank = self.trainer.accelerator.gather(broken)
        if by_rank.any():
            ranks = [f"rank {rank} in micro-batch {batch}" for rank, batch in by_rank.nonzero().tolist()]
            raise self._failure(f"the loss is not finite, first on {', '.join(ranks[:8])}")
        if self.trainer.accelerator.scaler is None:  # which skips steps whose scaled gradient overflows
            raise self._failure(f"the loss is finite, but the norm of its gradient is {float(norm)}")

    def _check_targets(self, device: torch.device) -> None:
        """Raise TrainingFailure if the step has no target: its mean loss is 0 / 0, whatever the learning rate."""
        own = torch.tensor([torch.inf if self.targets is None else float(torch.as_tensor(self.targets).max())])
        without = (self.trainer.accelerator.gather(own.to(device)) == 0).nonzero().flatten().tolist()
        if not without:
            return
        everywhere = len(without) == self.trainer.args.world_size
        ranks = "" if everywhere else f" of rank {', '.join(map(str, without))}"
        raise TrainingFailure(
            f"{where(self.trainer)}: the loss is a mean over targets, got none in this step's rows{ranks}: all labels "
            "are -100. Remove such rows from the data (their answers may lie beyond sequence_length), or use more "
            f"rows per step. {how_to_resume(self.trainer)}"
        )

    def check_logged(self, loss: float) -> None:
        if self.active and not math.isfinite(loss):
            raise self._failure(f"the logged loss is {loss}")

    def _failure(self, what: str) -> TrainingFailure:
        trainer = self.trainer
        return TrainingFailure(
            f"{where(trainer)}: {what}. Look at these rows, lower learning_rate or max_grad_norm, or warm up longer; "
            f"logging_nan_inf_filter=True goes on regardless. {how_to_resume(trainer)}"
        )
