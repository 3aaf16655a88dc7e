"""The language models' loss without their logits (`skip_logits`, as Liger's kernels call it)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from ..ops.cross_entropy import IGNORE_INDEX, chunked_cross_entropy


def loss_without_logits(
    model: PreTrainedModel,
    hidden_states: Tensor,
    labels: Tensor | None,
    *,
    shift: bool,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    **unused: Any,
) -> Tensor:
    """What `model.loss_function` makes of the logits of `hidden_states` `[B, T, hidden]`, to rounding.

    Args:
        labels: `[B, T]`, `ignore_index` where there is none.
        shift: every position predicts the next label, `shift_labels` if they are given.
        num_items_in_batch: the loss is the sum over the local targets divided by it; without it, their mean.

    Raises:
        ValueError: the model was given another loss function.
    """
    if model.loss_function is not LOSS_MAPPING[model.loss_type]:
        raise ValueError(
            f"skip_logits=True computes the cross-entropy, got a model with the loss function {model.loss_function}; "
            "leave skip_logits out (chunked_loss=False in the Trainer's arguments)"
        )
    assert labels is not None, "check_skipped comes first"
    targets = labels
    if shift:
        targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    head = model.get_output_embeddings()
    assert head is not None
    project = _Call(head)

    def loss(hidden_states: Tensor, targets: Tensor) -> Tensor:
        options = {"vocab_size": model.config.vocab_size, "ignore_index": ignore_index}
        total = chunked_cross_entropy(hidden_states, targets, project, **options)
        count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)

    return _in_place_of_forward(head, loss)(hidden_states, targets.to(hidden_states.device))


class _Call(nn.Module):
    """A module's forward pass alone, without hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.run = module, module.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def _in_place_of_forward(module: nn.Module, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Calls `module` with another forward pass: its hooks run once, around all of it. FSDP2's gather its weights."""

    def call(*inputs: Tensor) -> Tensor:
        own = vars(module).get("forward")
        module.forward = function  # type: ignore[method-assign]
        try:
            return module(*inputs)
        finally:
            if own is None:
                del module.forward
            else:
                module.forward = own  # type: ignore[method-assign]

    return call


def check_skipped(labels: Tensor | None, logits_to_keep: int | Tensor = 0) -> None:
    """`ValueError` unless a forward pass without logits has a loss."""
    if labels is None:
        raise ValueError("skip_logits=True leaves nothing but the loss, got no labels; pass labels, or take the logits")
    if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep:
        raise ValueError(f"skip_logits=True keeps no logits, got logits_to_keep={logits_to_keep}; give one of the two")
