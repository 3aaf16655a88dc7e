"""LinearLlama3Trainer: transformers' Trainer with sequence parallelism, reliability and adaptive groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer

from ..modeling import LinearLlama3PreTrainedModel, enable_sequence_tiling
from ..modeling.hub import write_shim
from ..modeling.model_card import add_card
from .adaptive.groups import AdaptiveGroups
from .arguments import ADAPTIVE
from .checkpoints.reliability import ReliabilityMixin
from .language_loss import LanguageLossMixin
from .memory.peak import peak_memory
from .progress import ProgressBar, ThroughputCallback


class LinearLlama3Trainer(ReliabilityMixin, LanguageLossMixin, Trainer):
    """transformers' Trainer with sequence parallelism: launch it on several processes, nothing else changes.

    With `sequence_parallel_size="adaptive"`, `adaptive_groups` provides and trains the steps. It is a part of the
    Trainer and not a subclass: the choice is an argument, which also reaches users' subclasses of this class.
    """

    adaptive_groups: AdaptiveGroups | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.throughput = ThroughputCallback()
        self.add_callback(self.throughput)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressBar)
        self._enable_tiling(self.model)
        if self._is_adaptive:
            self.adaptive_groups = AdaptiveGroups(self)

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """Make the model again for every run (Trainer's hook)."""
        model = super().call_model_init(*args, **kwargs)
        self._enable_tiling(model)
        return model

    def _enable_tiling(self, model: nn.Module) -> None:
        if getattr(self.args, "sequence_tiling", False):
            enable_sequence_tiling(model)

    # ---- static or adaptive groups

    @property
    def _is_adaptive(self) -> bool:
        return getattr(self.args, "sequence_parallel_size", None) == ADAPTIVE

    @property
    def _shards_sequences(self) -> bool:
        return self._is_adaptive or super()._shards_sequences

    def _wanted_degree(self) -> int | str:
        return 1 if self._is_adaptive else super()._wanted_degree()

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the run: of batches, or of the row numbers of steps in adaptive groups."""
        if self.adaptive_groups is None:
            return super().get_train_dataloader()
        loader, self.order = self.adaptive_groups.dataloader()
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return the batches of a step and its number of targets, or one planned step (Trainer's hook)."""
        if self.adaptive_groups is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        return self.adaptive_groups.next_step(epoch_iterator, device)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Train a micro-batch, or all micro-batches of a planned step."""
        train = super().training_step
        if self.adaptive_groups is None:
            return train(model, inputs, *args, **kwargs)
        return self.adaptive_groups.train_step(model, inputs, lambda batch: train(model, batch, *args, **kwargs))

    # ---- reports

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log like Trainer, with throughput and this process's peak memory next to the loss."""
        if "loss" in logs and self.is_in_train:
            logs |= {} if self.adaptive_groups is None else self.adaptive_groups.metrics()
            logs |= self.throughput.read(self.args, self.state)
            logs["peak_memory_gib"] = round(peak_memory() / 2**30, 3)
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model's own card, which describes its layers, unless the caller gives facts for Trainer's."""
        facts = bool(args) or not kwargs.keys() <= {"model_name", "tags"}
        if facts or not isinstance(self.model, LinearLlama3PreTrainedModel):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            add_card(self.model, folder, self.hub_model_id or folder.resolve().name)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload during the run with the files that Trainer does not know (Trainer's hook)."""
        if isinstance(self.model, LinearLlama3PreTrainedModel) and self.is_world_process_zero():
            write_shim(self.args.output_dir)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)
