"""The loss of an evaluation as the mean over all targets, and its perplexity.

transformers' Trainer averages the means of batches, weighted by rows: targets in short rows count more than others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling import LinearLlama3ForCausalLM
from ..ops.cross_entropy import IGNORE_INDEX
from ..ops.precision import working_dtype
from ..sequence_parallel import SequenceParallelContext
from ..sequence_parallel.collectives import all_reduce
from .data.order import without_labels


class TokenMeanMixin:
    """Evaluation by target for a Trainer of causal language models; other losses than the model's keep its mean."""

    _sums: Tensor | None = None  # [2], float64: losses and targets of the sequences of this process in an evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Like Trainer's, with the mean loss over all targets and `{metric_key_prefix}_perplexity`.

        Raises:
            ValueError: no row has a target.
        """
        self._sums = None
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        sums, self._sums = self._sums, None
        if sums is not None:
            loss, targets = (all_reduce(sums, dist.group.WORLD).wait() if dist.is_initialized() else sums).tolist()
            if not targets:
                raise ValueError("an evaluation needs a row with a target, got none; give rows of two tokens or more")
            mean = loss / targets
            output.metrics[f"{metric_key_prefix}_loss"] = mean
            output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(mean) if mean < 700 else math.inf
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Like Trainer's; also update the sums for `evaluation_loop`."""
        trainer: Any = self
        if not self._is_own_loss(inputs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
        if not prediction_loss_only:  # logits of complete sequences, on all their ranks
            loss, outputs, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
            counted = without_labels({"labels": labels}, self._repeated_rows(len(labels)))["labels"]
            self._add(_sums_of(outputs[0] if isinstance(outputs, tuple) else outputs, counted))
            return loss, outputs, labels
        inputs = trainer._prepare_inputs(inputs)
        inputs = without_labels(inputs, self._repeated_rows(len(inputs["labels"])))
        context = trainer.sequence_parallel_context
        with torch.no_grad(), trainer.compute_loss_context_manager():
            if context is None:
                local: dict[str, Any] = SequenceParallelContext(None).shard_batch(inputs)
            else:
                _, local = trainer._prepare_context_parallel_inputs(model, inputs)
            targets = (local["shift_labels"] != IGNORE_INDEX).sum()
            loss = model(**local, num_items_in_batch=1).loss.sum()  # summed over this process's targets
        sums = torch.stack([loss.double(), targets.double()])
        if context is not None:  # Trainer gathers losses that the ranks of a sequence agree on
            sums = all_reduce(sums, context.group).wait()
        self._add(sums)
        return sums[0] / sums[1].clamp(min=1), None, None

    def _add(self, sums: Tensor) -> None:
        self._sums = sums if self._sums is None else self._sums + sums

    def _is_own_loss(self, inputs: dict[str, Any]) -> bool:
        trainer: Any = self
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's
        others = trainer.label_smoother, trainer.compute_loss_func
        return (
            isinstance(model, LinearLlama3ForCausalLM)
            and inputs.get("labels") is not None
            and others == (None, None)
            and type(self).compute_loss.__module__.startswith("linear_llama3.")  # type: ignore[attr-defined]
        )

    def _repeated_rows(self, rows: int) -> int:
        """Return the number of rows at the end of a batch that accelerate has repeated to fill it."""
        trainer: Any = self
        state, context = trainer.accelerator.gradient_state, trainer.sequence_parallel_context
        if not state.end_of_dataloader or state.remainder <= 0:
            return 0
        before = trainer.args.process_index // (1 if context is None else context.world_size) * rows
        return rows - min(max(state.remainder - before, 0), rows)


def _sums_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed loss and the number of targets as float64 `[2]`: `logits` `[B, T, V]`, `labels` `[B, T]`."""
    options: dict[str, Any] = {"ignore_index": IGNORE_INDEX, "reduction": "sum"}
    rows = [F.cross_entropy(x[:-1].to(working_dtype(x)), y[1:], **options) for x, y in zip(logits, labels, strict=True)]
    return torch.stack([torch.stack(rows).double().sum(), (labels[:, 1:] != IGNORE_INDEX).sum().double()])
