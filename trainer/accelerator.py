"""An Accelerator that shards every sequence over several processes, for custom training loops and for the Trainer."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.scheduler import AcceleratedScheduler
from torch import nn

from ..ops.cross_entropy import IGNORE_INDEX
from ..sequence_parallel import SequenceParallelConfig, SequenceParallelContext, enable_sequence_parallel
from .launched import check_launch, launched_processes
from .parallelism import PeerCheck, install_cp_mesh, keep_precision, resolve_parallelism, visible_parallelism
from .rows import ReplicaScheduler, gather_rows


def bare_model(accelerator: Accelerator, model: Any) -> Any:
    """Return a model without the wrappers of accelerate and PEFT."""
    model = accelerator.unwrap_model(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class SequenceParallelAccelerator(Accelerator):
    """An Accelerator whose `cp` axis shards sequences for linear and softmax layers.

        accelerator = SequenceParallelAccelerator()
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            local = accelerator.shard_batch(batch)
            loss = model(**local, num_items_in_batch=accelerator.num_items(batch)).loss
            accelerator.backward(loss)

    `gather_for_metrics` and a prepared scheduler count every row once. `gather`, `reduce` and `pad_across_processes`
    are accelerate's own and work per process, and all ranks of a sequence hold the same rows. So `reduce(loss, "mean")`
    is the loss, but a sum over rows counts each row once for every rank of its sequence.

    Args:
        sequence_parallel_size: processes that share every sequence; "auto" takes all of the launch. accelerate's
            own setting (`parallelism_config`, `PARALLELISM_CONFIG_CP_SIZE`) takes precedence.
        sequence_parallel_config: strategies and layout.
        parallelism_config, kwargs: accelerate's.

    Raises:
        ValueError: the degree does not divide the number of processes, or accelerate has not joined the processes.
    """

    sequence_parallel_context: SequenceParallelContext | None = None

    def __init__(
        self,
        *args: Any,
        sequence_parallel_size: int | str = "auto",
        sequence_parallel_config: SequenceParallelConfig | None = None,
        parallelism_config: ParallelismConfig | None = None,
        **kwargs: Any,
    ) -> None:
        parallelism = resolve_parallelism(parallelism_config, sequence_parallel_size, launched_processes())
        if parallelism is None:
            super().__init__(*args, parallelism_config=parallelism_config, **kwargs)
        else:
            cpu, plugin = kwargs.get("cpu", False), kwargs.get("fsdp_plugin")
            with visible_parallelism(parallelism, plugin, cpu=cpu) as visible:  # builds the process group
                super().__init__(*args, parallelism_config=visible, **kwargs)
        check_launch(self.num_processes)
        keep_precision(self)
        self._causal = True
        self.check_peers = PeerCheck()
        if parallelism is not None:
            config = sequence_parallel_config or SequenceParallelConfig()
            self.sequence_parallel_context = SequenceParallelContext(install_cp_mesh(self, parallelism), config)

    def _prepare_cp(self, *args: Any) -> Any:
        """Return what is prepared unchanged: accelerate would shard softmax attention, and refuse linear attention."""
        return args

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Gather like Accelerator's, with every row of the dataset once (`rows.gather_rows`)."""
        if self._ranks == 1:
            return super().gather_for_metrics(input_data, use_gather_object)
        return gather_rows(self, self._ranks, input_data, use_gather_object)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare like Accelerator's; models also get the sequence-parallel context."""
        for model in args:
            if isinstance(model, nn.Module):
                self._causal &= getattr(getattr(model, "config", None), "is_causal", True)
                if self.sequence_parallel_context is not None:
                    enable_sequence_parallel(model, self.sequence_parallel_context)
        return super().prepare(*args, **kwargs)

    @property
    def _ranks(self) -> int:
        """Number of ranks that share a sequence."""
        return 1 if self.sequence_parallel_context is None else self.sequence_parallel_context.world_size

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """Like Accelerator's, but the scheduler advances once for each replica, not for each process."""
        prepared = super().prepare_scheduler(scheduler)
        if self._ranks == 1 or not isinstance(prepared, AcceleratedScheduler) or prepared.split_batches:
            return prepared
        self._schedulers[-1] = ReplicaScheduler(prepared, self.num_processes // self._ranks)
        return self._schedulers[-1]

    def shard_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return this process's part of a batch from a prepared loader (`SequenceParallelContext.shard_batch`)."""
        context = self.sequence_parallel_context
        if context is None:
            return batch
        self.check_peers(context, batch)
        return context.shard_batch(batch)

    def num_items(self, *batches: dict[str, Any]) -> float:
        """Return the model's `num_items_in_batch` for the complete batches that this process accumulates in one step.

        It is the number of labels in all processes' batches, divided by the number of processes and by accelerate's
        gradient accumulation steps, since the gradients are divided by both: they become those of the mean over all
        labels. It is a Python number, since mixed precision would round a floating-point tensor.
        """
        first = 1 if self._causal else 0  # nothing predicts the first token of a causal model
        targets = [
            batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, first:] for batch in batches
        ]
        local = torch.stack([labels.ne(IGNORE_INDEX).sum() for labels in targets]).sum().to(self.device)
        total = self.reduce(local, reduction="sum").item()
        return total / self._ranks / self.num_processes / self.gradient_accumulation_steps
