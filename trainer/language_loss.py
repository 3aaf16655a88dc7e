"""The loss of language models: without logits that nothing reads, and in evaluations the mean over all targets.

transformers' Trainer averages the means of batches, weighted by rows: a target in a short row then counts more.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling import LinearLlama3ForCausalLM, LinearLlama3ForMaskedLM
from ..ops.cross_entropy import IGNORE_INDEX
from ..ops.precision import working_dtype
from ..sequence_parallel import SequenceParallelContext
from ..sequence_parallel.collectives import all_reduce
from .accelerator import bare_model
from .data.order import without_labels
from .sharding import SequenceParallelMixin


class LanguageLossMixin(SequenceParallelMixin):
    """Loss and evaluation of this package's language models; other models and losses keep Trainer's."""

    _sums: Tensor | None = None  # [2], float64: losses and targets of the sequences of this process in an evaluation

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the loss like Trainer, without logits unless the caller wants them."""
        if not return_outputs:
            inputs = self._without_logits(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _without_logits(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs with `skip_logits` if the model computes its own loss and nothing else reads its logits."""
        chunked = getattr(self.args, "chunked_loss", True)
        if chunked and self._is_own_loss(inputs, LinearLlama3ForCausalLM, LinearLlama3ForMaskedLM):
            return {**inputs, "skip_logits": True}
        return inputs

    def _is_own_loss(self, inputs: dict[str, Any], *models: type) -> bool:
        """Return True if there are labels, and a model of one of these classes computes the loss."""
        own = self.label_smoother is None and self.compute_loss_func is None and inputs.get("labels") is not None
        return own and isinstance(bare_model(self.accelerator, self.model), models)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate like Trainer, with the mean loss over all targets and `{metric_key_prefix}_perplexity`.

        Raises:
            ValueError: no row has a target.
        """
        self._sums = None
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if (sums := self._sums) is not None:
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
        """Predict like the base class, and update the sums for `evaluation_loop`."""
        if prediction_loss_only:
            inputs = self._without_logits(inputs)
        own = type(self).compute_loss.__module__.startswith("linear_llama3.")
        if not (own and self._is_own_loss(inputs, LinearLlama3ForCausalLM)):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        repeated = self._repeated_rows(len(inputs["labels"]))
        if not prediction_loss_only:  # logits of complete sequences, on all their ranks
            loss, outputs, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            counted = without_labels({"labels": labels}, repeated)["labels"]
            self._add(_sums_of(outputs[0] if isinstance(outputs, tuple) else outputs, counted))
            return loss, outputs, labels
        inputs = without_labels(self._prepare_inputs(inputs), repeated)
        context = self.sequence_parallel_context
        with torch.no_grad(), self.compute_loss_context_manager():
            if context is None:
                local: dict[str, Any] = SequenceParallelContext(None).shard_batch(inputs)
            else:
                _, local = self._prepare_context_parallel_inputs(model, inputs)
            targets = (local["shift_labels"] != IGNORE_INDEX).sum()
            loss = model(**local, num_items_in_batch=1).loss.sum()  # summed over this process's targets
        sums = torch.stack([loss.double(), targets.double()])
        if context is not None and context.group is not None:  # Trainer expects one loss for all ranks of a sequence
            sums = all_reduce(sums, context.group).wait()
        self._add(sums)
        return sums[0] / sums[1].clamp(min=1), None, None

    def _add(self, sums: Tensor) -> None:
        self._sums = sums if self._sums is None else self._sums + sums

    def _repeated_rows(self, rows: int) -> int:
        """Return the number of rows at the end of a batch that accelerate has repeated to fill it."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return 0
        before = self.args.process_index // self._ranks * rows
        return rows - min(max(state.remainder - before, 0), rows)


def _sums_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed loss and the number of targets as float64 `[2]`: `logits` `[B, T, V]`, `labels` `[B, T]`."""
    options: dict[str, Any] = {"ignore_index": IGNORE_INDEX, "reduction": "sum"}
    rows = [F.cross_entropy(x[:-1].to(working_dtype(x)), y[1:], **options) for x, y in zip(logits, labels, strict=True)]
    return torch.stack([torch.stack(rows).double().sum(), (labels[:, 1:] != IGNORE_INDEX).sum().double()])
