"""`sequence_parallel_size="adaptive"`: the Trainer plans groups for every step and runs its micro-batches in them.

FlexSP (arXiv 2412.01523), by `sequence_parallel/planner`. DDP or FSDP2 goes over all ranks, whatever the groups: every
rank runs as many micro-batches, synchronises in the last one, and its loss is the sum over its tokens divided by the
targets of all ranks. Weights never move. A step takes per_device_train_batch_size rows for each process.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ...modeling import LinearLlama3Config, LinearLlama3ForCausalLM
from ...modeling.flops import attention_pairs, count_flops
from ...sequence_parallel import LAYOUTS, enable_sequence_parallel
from ...sequence_parallel.planner import (
    Cluster,
    Model,
    fewest_groups,
    load_profile,
    model_costs,
)
from ..data.order import DataOrder, content_hash
from ..failures import on_every_rank, reading
from ..parallelism import REFUSED_ENGINES, PeerCheck, check_overrides
from .checks import check_arguments, check_profile, check_training
from .planned_steps import GroupKey, OneAhead, PlannedStep, StepPlanner, fingerprint, group_contexts

if TYPE_CHECKING:
    from ..trainer import SequenceParallelMixin as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)

ADAPTIVE = "adaptive"


def planner_model(config: LinearLlama3Config, element: int) -> Model:
    """What the planner's costs need to know of a model.

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
        decays=True,  # sequences are packed, and a decay tells the states where a document begins
        element=element,
    )


class AdaptiveMixin(_Trainer):
    """Put before `SequenceParallelMixin`. Without "adaptive" it changes nothing."""

    adapts = False
    _planner: OneAhead | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's hook: no static groups, so accelerate sees data-parallel processes only."""
        args: Any = self.args
        self.adapts = getattr(args, "sequence_parallel_size", None) == ADAPTIVE
        if self.adapts:
            check_arguments(args)
        super().create_accelerator_and_postprocess()
        if self.adapts:
            self._check_accelerator()

    @property
    def _holds_parts(self) -> bool:
        return self.adapts or super()._holds_parts

    def _wanted_degree(self) -> int | str:
        return 1 if self.adapts else super()._wanted_degree()

    def _check_accelerator(self) -> None:
        if self.sequence_parallel_context is not None:
            raise ValueError(
                "adaptive groups stand for a static degree, got both: a cp size of "
                f"{self.sequence_parallel_context.world_size} by accelerate's settings; take one of them out"
            )
        check_overrides(type(self))
        if (engine := self.accelerator.state.distributed_type) in REFUSED_ENGINES:
            raise ValueError(f"adaptive groups go with DDP and FSDP2, got {engine.value}; launch with --multi_gpu")

    def prepare_groups(self) -> None:
        """Costs, and contexts by group: once, on all ranks, when the model is there."""
        args: Any = self.args
        if others := _unlike_first(on_every_rank(self._settle_costs)):
            raise ValueError(  # before ranks make groups that others do not know
                f"all ranks must plan by the same costs, got others on {others} than on rank 0; give all processes the "
                "same planner_profile (a file of the same content), model, strategies and sequence_layout"
            )
        self._contexts = group_contexts(
            self._bare_model(),
            self.costs,
            args.sequence_layout,
            devices=args.world_size,
            timeout=args.ddp_timeout,
            device=self.accelerator.device,
        )
        self._times: list[tuple[float, float]] = []  # predicted and measured, of the steps since the last log entry
        self._degrees: Counter[int] = Counter()  # of their groups
        self._step: PlannedStep | None = None

    def _settle_costs(self) -> str:
        """What plans rest on, and a fingerprint of it."""
        args: Any = self.args
        model = self._bare_model()
        if not isinstance(model, LinearLlama3ForCausalLM) or not model.config.is_causal:
            raise ValueError(
                f"adaptive groups train causal language models, got a {type(model).__name__}; choose a "
                "sequence_parallel_size"
            )
        if self.compute_loss_func is not None:
            raise ValueError("adaptive groups take no compute_loss_func: it would see parts of sequences")
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
        check_training(profile, args, again, fsdp=self.is_fsdp_enabled)
        if args.sequence_layout != "auto":
            self.costs = replace(self.costs, chunks_per_rank=LAYOUTS[args.sequence_layout].chunks_per_rank)
        self._cluster = Cluster(devices=args.world_size, memory=profile.bytes.device)
        return fingerprint((self.costs, self._cluster, args.sequence_layout))

    def _bare_model(self) -> nn.Module:
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's

    # ---- the data

    def get_train_dataloader(self) -> DataLoader:
        """Numbers of every step's rows, in the same order on all ranks; `get_batch_samples` makes steps of them."""
        if not self.adapts:
            return super().get_train_dataloader()
        dataset, collate = self._rows()
        rows_per_step = self.get_total_train_batch_size(self.args)
        self._check_last_step(len(dataset), rows_per_step)
        numbers: Any = range(len(dataset))
        loader = DataLoader(
            numbers,
            batch_size=rows_per_step,
            sampler=self._get_train_sampler(dataset),
            collate_fn=list,
            drop_last=self.args.dataloader_drop_last,
        )
        loader = prepare_data_loader(  # as for one process: all ranks plan the same step
            loader,
            num_processes=1,
            process_index=0,
            use_seedable_sampler=self.accelerator.use_seedable_sampler,
            data_seed=self.accelerator.dataloader_config.data_seed,
        )
        self._order = DataOrder.of(
            loader,
            rows_per_step=rows_per_step,
            rows_per_batch=rows_per_step,
            drop_last=self.args.dataloader_drop_last,
            content=content_hash(self.train_dataset),
        )
        make = StepPlanner(
            dataset,
            collate,
            self._contexts,
            cluster=self._cluster,
            costs=self.costs,
            rank=self.args.process_index,
        )
        self._planner = OneAhead(make)
        self._peer_checks: dict[GroupKey, PeerCheck] = {key: PeerCheck() for key in self._contexts}
        return loader

    def _rows(self) -> tuple[Any, Any]:
        """Dataset and collator, without the columns that the model does not know."""
        dataset = self.train_dataset
        if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                "adaptive groups are planned from the lengths of stored rows, got "
                f"{'no train_dataset' if dataset is None else 'a stream'}; store the data, or choose a "
                "sequence_parallel_size"
            )
        if isinstance(dataset, Dataset):
            return self._remove_unused_columns(dataset, description="training"), self.data_collator
        return dataset, self._get_collator_with_removed_columns(self.data_collator, description="training")

    def _check_last_step(self, rows: int, rows_per_step: int) -> None:
        """Every device needs a sequence, or a share of one, also in the last step of an epoch."""
        left, needed = rows % rows_per_step, fewest_groups(self.costs.by_degree, self.args.world_size)
        if 0 < left < needed and not self.args.dataloader_drop_last:
            raise ValueError(
                f"a step on {self.args.world_size} processes needs at least {needed} rows (in groups of "
                f"{' or '.join(map(str, sorted(self.costs.by_degree)))}), got {left} in the last one of an epoch of "
                f"{rows} rows; set dataloader_drop_last=True"
            )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Trainer's hook: one planned step, and the targets of all ranks."""
        if self._planner is None or not self.adapts:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        read = on_every_rank(partial(self._read_step, self._planner, epoch_iterator))
        fingerprints, targets = zip(*read, strict=True)
        if others := _unlike_first(fingerprints):
            raise ValueError(
                f"all ranks must make the same plan, got others of step {self.state.global_step + 1} on {others} than "
                "on rank 0; give all processes the same data and seeds"
            )
        return ([], None) if self._step is None else ([self._step], torch.tensor(sum(targets), device=device))

    def _read_step(self, planner: OneAhead, epoch_iterator: Any) -> tuple[str | None, int]:
        """What ranks compare and add up of the next step: its fingerprint and its targets here."""
        with reading(self):
            step = self._step = planner.next(epoch_iterator)
        return (None, 0) if step is None else (step.fingerprint, step.targets)

    # ---- the step

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's, over all micro-batches of a planned step."""
        if not isinstance(inputs, PlannedStep):
            return super().training_step(model, inputs, *args, **kwargs)
        start = time.perf_counter()
        loss = torch.zeros((), device=self.accelerator.device)
        for n, portion in enumerate(inputs.portions):
            context = self._contexts[portion.group]
            self._peer_checks[portion.group](context, {"input_ids": portion.tokens.to(self.accelerator.device)})
            enable_sequence_parallel(model, context)
            self._prepare_noise(model, {"input_ids": portion.tokens})
            last = n + 1 == len(inputs.portions)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                loss += super().training_step(model, portion.inputs, *args, **kwargs)
        enable_sequence_parallel(model, None)  # evaluations take whole rows
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self._note(inputs, time.perf_counter() - start)
        return loss

    def _note(self, step: PlannedStep, seconds: float) -> None:
        self._times.append((step.plan.seconds, seconds))
        self._degrees.update(group.degree for batch in step.plan.micro_batches for group in batch.groups)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Trainer's hook; a step knows the tokens of all ranks, and has no padding."""
        if not isinstance(inputs, PlannedStep):
            super()._track_num_input_tokens(inputs)
        elif self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += inputs.tokens

    def floating_point_ops(self, inputs: Any) -> float:
        """Trainer's hook: this rank's share."""
        if not isinstance(inputs, PlannedStep):
            return super().floating_point_ops(inputs)
        flops = 0.0
        for portion in inputs.portions:
            own = count_flops(self.model, sum(portion.lengths), attention_pairs(portion.lengths))
            flops += own.training / portion.group[0]
        return flops

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the mean times of a step, forward and backward, and how many groups of each degree ran."""
        if self.adapts and self._times and "loss" in logs:
            predicted, measured = (sum(times) / len(self._times) for times in zip(*self._times, strict=True))
            logs["predicted_step_seconds"], logs["measured_step_seconds"] = round(predicted, 4), round(measured, 4)
            logs |= {f"groups_of_{degree}": self._degrees[degree] for degree in sorted(self.costs.by_degree)}
            if self.args.process_index == 0 and self._step is not None:
                logger.info(
                    "step %d: groups %s; predicted %.3g s, measured %.3g s (mean of the last %d steps)",
                    self.state.global_step, self._step.plan, predicted, measured, len(self._times),
                )  # fmt: skip
            self._times.clear()
            self._degrees.clear()
        super().log(logs, *args, **kwargs)


def _unlike_first(facts: Sequence[object]) -> str:
    """The ranks whose fact is not that of rank 0, for a message."""
    others = [str(rank) for rank, fact in enumerate(facts) if fact != facts[0]]
    return f"rank{'s' * (len(others) > 1)} {', '.join(others[:8])}{', ...' * (len(others) > 8)}" if others else ""
