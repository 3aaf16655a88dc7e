"""Messages of failed runs: the step, the rank, the cause and what to do."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size

from .checkpoints import manifest

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TrainingFailure(RuntimeError):
    """A run that cannot continue."""


@contextlib.contextmanager
def annotate_errors(trainer: Any) -> Iterator[None]:
    """Give errors of a run the step, the rank and a remedy, in their message or, if the cause is unknown, in the log.

    The other ranks then fail in a collective; their message repeats the cause, or names the rank that did not answer.
    """
    store = FailureStore(trainer.args.process_index, trainer.args.world_size)
    try:
        yield
    except Exception as error:
        if is_collective(error):
            raise TrainingFailure(_describe_lost_rank(trainer, error, store)) from error
        if should_reduce_batch_size(error) or isinstance(error, torch.OutOfMemoryError):
            text = explain(trainer, f"out of memory. {_less_memory(trainer)}")
            store.post(text)
            raise torch.OutOfMemoryError(text) from error
        if isinstance(error, (TrainingFailure, manifest.ResumeError)):
            store.post(str(error))
            raise
        store.post(f"{step_and_rank(trainer)}: {type(error).__name__}: {error}")
        logger.error(explain(trainer, "the run cannot continue."))
        raise


@contextlib.contextmanager
def annotate_read_errors(trainer: Any) -> Iterator[None]:
    """Explain errors while batches are read, except a ValueError, by which the data explains itself."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (ValueError, TrainingFailure)) or is_collective(error):
            raise
        text = (
            f"the data could not be read: {type(error).__name__}: {error}. Check that it can be reached from this "
            "machine and that these rows are complete."
        )
        raise TrainingFailure(explain(trainer, text)) from error


def on_every_rank(make: Callable[[], T]) -> list[T]:
    """Return the results of `make` on all ranks, which must be small and picklable.

    All ranks must call it, and `make` must not communicate.

    Raises:
        Exception: `make`'s own. The other ranks, which would otherwise wait for this one until ddp_timeout, raise
            ValueError or TrainingFailure with its text.
    """
    made, failure, report = None, None, None
    try:
        made = make()
    except Exception as error:
        mistake, known = isinstance(error, ValueError), isinstance(error, (ValueError, TrainingFailure))
        failure, report = error, (mistake, str(error) if known else f"{type(error).__name__}: {error}")
    answers = gather_object([(made, report)])
    if failure is not None:
        raise failure
    for rank, (_, report) in enumerate(answers):
        if report is not None:
            mistake, text = report
            raise (ValueError if mistake else TrainingFailure)(f"rank {rank} has failed: {text}")
    return [made for made, _ in answers]


class FailureStore:
    """Exchange of the ranks of a failed run, through torch's key-value store.

    torchrun's error files (`torch.distributed.elastic`'s record) do not replace it. They name the first process that
    ended: if a rank hangs, one of those that waited for it. And launches by SLURM or MPI have none.
    """

    _runs = itertools.count()  # the same in all processes

    def __init__(self, rank: int, world_size: int) -> None:
        run = next(self._runs)
        self.rank, self.keys = rank, [f"linear_llama3/failures/{run}/{other}" for other in range(world_size)]

    def post(self, cause: str = "") -> None:
        """Tell the other ranks that this one is alive, and the cause of its failure if it is known."""
        if len(self.keys) > 1:
            with contextlib.suppress(RuntimeError):  # the store may have ended with its process
                dist.distributed_c10d._get_default_store().set(self.keys[self.rank], cause)

    def collect(self, *, seconds: float = 3.0) -> tuple[list[int], str]:
        """Return the ranks that post nothing within some time, and the causes that others have posted.

        Raises:
            RuntimeError: the store has ended with its process (rank 0's, or torchrun's).
        """
        store: Any = dist.distributed_c10d._get_default_store()
        deadline = time.monotonic() + seconds
        while not store.check(self.keys) and time.monotonic() < deadline:
            time.sleep(0.1)
        posted = {rank: store.get(key).decode() for rank, key in enumerate(self.keys) if store.check([key])}
        silent = [rank for rank in range(len(self.keys)) if rank not in posted and rank != self.rank]
        return silent, "\n".join(filter(None, posted.values()))


@contextlib.contextmanager
def annotate_write_errors(trainer: Any, folder: Path) -> Iterator[None]:
    """Explain errors while a checkpoint is written."""
    try:
        yield
    except Exception as error:
        if is_collective(error):
            raise
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free / 2**30
        text = (
            f"{folder} could not be written: {error} ({free:.2f} GiB are free there). Free space, or keep fewer "
            "checkpoints with save_total_limit."
        )
        raise TrainingFailure(explain(trainer, text, saving=True)) from error


def step_and_rank(trainer: Any, *, saving: bool = False) -> str:
    """Return the step that a process is in, or saves, and its rank, for messages."""
    args = trainer.args
    return f"step {trainer.state.global_step + (not saving)}, rank {args.process_index} of {args.world_size}"


def explain(trainer: Any, text: str, *, saving: bool = False) -> str:
    """Return the message of a failure: step and rank, the text, and the checkpoint to resume from."""
    newest = manifest.newest(Path(trainer.args.output_dir))
    resume = f"{newest} is complete: resume_from_checkpoint=True continues from it."
    if newest is None:
        resume = "There is no complete checkpoint to resume from."
    return f"{step_and_rank(trainer, saving=saving)}: {text} {resume}"


def is_collective(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _describe_lost_rank(trainer: Any, error: Exception, store: FailureStore) -> str:
    """Return the rank whose answer is missing in a collective, why, and what to do."""
    store.post()
    try:
        silent, causes = store.collect()
    except RuntimeError:
        text = "another rank has ended, and with rank 0 the store of failure messages; that rank's own output says why."
        return explain(trainer, text)
    if causes:
        return f"{step_and_rank(trainer)}: another rank has failed: {causes}"  # which says how to resume
    ranks = f"rank {', '.join(map(str, silent))}" if silent else "another rank"
    if "timed out" in str(error).lower() or "timeout" in str(error).lower():
        text = (
            f"{ranks} did not answer within ddp_timeout = {trainer.args.ddp_timeout} s. It hangs, or needs longer: "
            "raise ddp_timeout."
        )
    else:
        text = (
            f"{ranks} exited without an error message (killed? check the host's memory): `linear-llama3 train "
            "RECIPE.yaml --dry-run` computes the memory that a rank needs."
        )
    return explain(trainer, text)


def _less_memory(trainer: Any) -> str:
    """Return what the step needed, and measures that need less, the cheapest first."""
    if getattr(trainer, "adaptive_groups", None) is not None:
        return (
            "Plans stay within the profile's memory: lower `device` under `bytes` in planner_profile, or set "
            "gradient_checkpointing=True and measure a new profile with it."
        )
    args, context = trainer.args, getattr(trainer, "sequence_parallel_context", None)
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
    elif next_degree % degree == 0:  # so that a step keeps its number of rows
        step += f" with gradient_accumulation_steps={args.gradient_accumulation_steps * next_degree // degree}"
    if length is None:
        return f"Use {', or '.join([*measures, step])}."
    measures.append(f"{step}, {-(-length // next_degree)} tokens a rank")
    return (
        f"The batch has {rows} x {length} tokens over {degree} ranks, {-(-length // degree)} of every row on each. "
        f"Use {', or '.join(measures)}."
    )
