"""Adaptive groups: the Trainer plans groups for every step and runs its micro-batches in them.

FlexSP (arXiv 2412.01523), by `sequence_parallel/planner`. DDP or FSDP2 spans all ranks, whatever the groups: every rank
runs the same number of micro-batches and synchronizes in the last one, and its loss is the sum over its tokens
divided by the targets of all ranks. Weights never move. A step has per_device_train_batch_size rows for each process.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ...modeling import LinearLlama3Config, LinearLlama3ForCausalLM
from ...sequence_parallel import LAYOUTS, enable_sequence_parallel
from ...sequence_parallel.planner import (
    Cluster,
    Model,
    fewest_groups,
    load_profile,
    model_costs,
)
from ..accelerator import bare_model
from ..data.order import content_hash, data_order
from ..failures import annotate_read_errors, on_every_rank
from ..hooks import check_overrides
from ..parallelism import PeerCheck, check_engine
from .checks import check_arguments, check_profile, check_training
from .planned_steps import PlannedStep, Prefetcher, StepPlanner, fingerprint, group_contexts

logger = logging.getLogger(__name__)


def planner_model(config: LinearLlama3Config, element: int) -> Model:
    """Return the facts of a model on which the planner's costs depend.

    Args:
        element: bytes of an activation in training.
    """
    assert config.num_key_value_heads is not None and config.head_dim is not None
    linear = len(config.linear_layers)
    return Model(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        softmax_layers=config.num_hidden_layers - linear,
        linear_layers=linear,
        q_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mixer=config.linear_attention_type,
        state=config.linear_state_shape,
        decays=True,  # sequences are packed, and a decay of zero separates their states
        element=element,
    )


class AdaptiveGroups:
    """The groups of a Trainer: its loader, its planned steps and their training. All ranks must build it.

    Args:
        trainer: a LinearLlama3Trainer that is otherwise set up.

    Raises:
        ValueError: the arguments, the model or the profile do not fit adaptive groups.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        args = trainer.args
        check_arguments(args)
        if trainer.sequence_parallel_context is not None:
            raise ValueError(
                "adaptive groups replace a static degree, got both: a cp size of "
                f"{trainer.sequence_parallel_context.world_size} by accelerate's settings; remove one of them"
            )
        check_overrides(type(trainer))
        check_engine(trainer.accelerator)
        if others := _unlike_first(on_every_rank(self._settle_costs)):
            raise ValueError(  # before ranks make groups that others do not know
                f"all ranks must plan by the same costs, got different ones on {others} than on rank 0; give all "
                "processes the same planner_profile (a file of the same content), model, strategies and sequence_layout"
            )
        self.contexts = group_contexts(
            bare_model(trainer.accelerator, trainer.model),
            self.costs,
            args.sequence_layout,
            devices=args.world_size,
            timeout=args.ddp_timeout,
            device=trainer.accelerator.device,
        )
        self._peer_checks = {key: PeerCheck() for key in self.contexts}
        self._times: list[tuple[float, float]] = []  # predicted and measured, of the steps since the last log entry
        self._degrees: Counter[int] = Counter()  # of their groups
        self._step: PlannedStep | None = None

    def _settle_costs(self) -> str:
        """Set the costs that plans rest on, and return their fingerprint."""
        trainer, args, model = self.trainer, self.trainer.args, bare_model(self.trainer.accelerator, self.trainer.model)
        if not isinstance(model, LinearLlama3ForCausalLM) or not model.config.is_causal:
            raise ValueError(
                f"adaptive groups train causal language models, got a {type(model).__name__}; choose a "
                "sequence_parallel_size"
            )
        if trainer.compute_loss_func is not None:
            raise ValueError(
                "adaptive groups accept no compute_loss_func, since it would see parts of sequences, got "
                f"{trainer.compute_loss_func}; let the model compute the loss"
            )
        profile = load_profile(args.planner_profile)
        again = check_profile(profile, args.planner_profile, args.world_size)
        element = 2 if args.bf16 or args.fp16 else model.dtype.itemsize
        self.costs = model_costs(
            profile,
            args.world_size,
            model=planner_model(model.config, element),
            linear=args.linear_strategy,
            softmax=args.softmax_strategy,
        )
        check_training(profile, args, again, fsdp=trainer.is_fsdp_enabled)
        if args.sequence_layout != "auto":
            self.costs = replace(self.costs, chunks_per_rank=LAYOUTS[args.sequence_layout].chunks_per_rank)
        self._cluster = Cluster(devices=args.world_size, memory=profile.bytes.device)
        return fingerprint((self.costs, self._cluster, args.sequence_layout))

    def dataloader(self) -> tuple[DataLoader, dict[str, Any]]:
        """Return a loader of the row numbers of every step, the same on all ranks, and its order of the rows."""
        trainer, args = self.trainer, self.trainer.args
        dataset, collate = self._rows()
        rows_per_step = trainer.get_total_train_batch_size(args)
        self._check_last_step(len(dataset), rows_per_step)
        numbers: Any = range(len(dataset))
        loader = DataLoader(
            numbers,
            batch_size=rows_per_step,
            sampler=trainer._get_train_sampler(dataset),
            collate_fn=list,
            drop_last=args.dataloader_drop_last,
        )
        loader = prepare_data_loader(  # as for one process: all ranks plan the same step
            loader,
            num_processes=1,
            process_index=0,
            use_seedable_sampler=trainer.accelerator.use_seedable_sampler,
            data_seed=trainer.accelerator.dataloader_config.data_seed,
        )
        order = data_order(
            loader,
            rows_per_step=rows_per_step,
            rows_per_batch=rows_per_step,
            drop_last=args.dataloader_drop_last,
            content=content_hash(trainer.train_dataset),
        )
        self._steps = Prefetcher(
            StepPlanner(
                dataset, collate, self.contexts, cluster=self._cluster, costs=self.costs, rank=args.process_index
            )
        )
        self._peer_checks = {key: PeerCheck() for key in self.contexts}
        return loader, order

    def _rows(self) -> tuple[Any, Any]:
        """Return dataset and collator, without the columns that the model does not know."""
        trainer, dataset = self.trainer, self.trainer.train_dataset
        if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                "adaptive groups are planned from the lengths of stored rows, got "
                f"{'no train_dataset' if dataset is None else 'a stream'}; store the data, or choose a "
                "sequence_parallel_size"
            )
        if isinstance(dataset, Dataset):
            return trainer._remove_unused_columns(dataset, description="training"), trainer.data_collator
        return dataset, trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")

    def _check_last_step(self, rows: int, rows_per_step: int) -> None:
        """Raise ValueError if the last step of an epoch has too few rows to give every device a part of one."""
        args = self.trainer.args
        left, needed = rows % rows_per_step, fewest_groups(self.costs.by_degree, args.world_size)
        if 0 < left < needed and not args.dataloader_drop_last:
            raise ValueError(
                f"a step on {args.world_size} processes needs at least {needed} rows (in groups of "
                f"{' or '.join(map(str, sorted(self.costs.by_degree)))}), got {left} in the last one of an epoch of "
                f"{rows} rows; set dataloader_drop_last=True"
            )

    def next_step(self, epoch_iterator: Iterator[Any], device: torch.device) -> tuple[list[PlannedStep], Any]:
        """Return what Trainer's `get_batch_samples` returns: one planned step, and the targets of all ranks."""
        read = on_every_rank(partial(self._read_step, epoch_iterator))
        fingerprints, targets = zip(*read, strict=True)
        if others := _unlike_first(fingerprints):
            raise ValueError(
                f"all ranks must make the same plan, got different ones of step {self.trainer.state.global_step + 1} "
                f"on {others} than on rank 0; give all processes the same data and seeds"
            )
        return ([], None) if self._step is None else ([self._step], torch.tensor(sum(targets), device=device))

    def _read_step(self, epoch_iterator: Iterator[Any]) -> tuple[str | None, int]:
        """Read the next step, and return what ranks compare and add up: its fingerprint and its targets here."""
        with annotate_read_errors(self.trainer):
            step = self._step = self._steps.next(epoch_iterator)
        return (None, 0) if step is None else (step.fingerprint, step.targets)

    def train_step(self, model: nn.Module, step: PlannedStep, train: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        """Train all micro-batches of a planned step, and return their loss.

        Args:
            train: trains the inputs of one micro-batch, forward and backward, and returns their loss.
        """
        accelerator = self.trainer.accelerator
        start = time.perf_counter()
        loss = torch.zeros((), device=accelerator.device)
        for n, batch in enumerate(step.micro_batches):
            context = self.contexts[batch.group]
            self._peer_checks[batch.group](context, {"input_ids": batch.tokens.to(accelerator.device)})
            enable_sequence_parallel(model, context)
            self.trainer.prepare_noise(model, {"input_ids": batch.tokens})
            last = n + 1 == len(step.micro_batches)
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                loss += train(batch.inputs)
        enable_sequence_parallel(model, None)  # evaluations use complete rows
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self._times.append((step.plan.seconds, time.perf_counter() - start))
        self._degrees.update(group.degree for batch in step.plan.micro_batches for group in batch.groups)
        return loss

    def metrics(self) -> dict[str, float]:
        """Return the mean times of a step, forward and backward, and the number of groups of each degree, and reset."""
        if not self._times:
            return {}
        predicted, measured = (sum(times) / len(self._times) for times in zip(*self._times, strict=True))
        metrics = {"predicted_step_seconds": round(predicted, 4), "measured_step_seconds": round(measured, 4)}
        metrics |= {f"groups_of_{degree}": self._degrees[degree] for degree in sorted(self.costs.by_degree)}
        if self.trainer.args.process_index == 0 and self._step is not None:
            logger.info(
                "step %d: groups %s; predicted %.3g s, measured %.3g s (mean of the last %d steps)",
                self.trainer.state.global_step, self._step.plan, predicted, measured, len(self._times),
            )  # fmt: skip
        self._times.clear()
        self._degrees.clear()
        return metrics


def _unlike_first(facts: Sequence[object]) -> str:
    """Return the ranks whose fact is not that of rank 0, for a message."""
    others = [str(rank) for rank, fact in enumerate(facts) if fact != facts[0]]
    return f"rank{'s' * (len(others) > 1)} {', '.join(others[:8])}{', ...' * (len(others) > 8)}" if others else ""
