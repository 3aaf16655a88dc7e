"""The chunked loss: cross-entropy without the logits of all tokens (`skip_logits`, a name of Liger's kernels)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from ..ops.cross_entropy import IGNORE_INDEX, chunked_cross_entropy


def chunked_loss(
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
    """Return `model.loss_function` of the logits of `hidden_states` `[B, T, hidden]`, computed some tokens at a time.

    Args:
        labels: int `[B, T]`, `ignore_index` where there is none.
        shift: position t predicts label t + 1, or label t of `shift_labels` if given.
        num_items_in_batch: the loss is the sum over the local targets divided by this number; None: their mean.

    Returns:
        The loss, float32 or float64.

    Raises:
        ValueError: the model has a custom loss function.
    """
    if model.loss_function is not LOSS_MAPPING[model.loss_type]:
        raise ValueError(
            f"skip_logits=True computes the cross-entropy, got a model with the loss function {model.loss_function}; "
            "leave skip_logits out (chunked_loss=False in the Trainer's arguments)"
        )
    assert labels is not None, "check_skip_logits comes first"
    targets = labels
    if shift:
        targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    head = model.get_output_embeddings()
    assert head is not None
    project = _Projection(head)

    def loss(hidden_states: Tensor, targets: Tensor) -> Tensor:
        options = {"vocab_size": model.config.vocab_size, "ignore_index": ignore_index}
        total = chunked_cross_entropy(hidden_states, targets, project, **options)
        count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)

    with _replaced_forward(head, loss):
        return head(hidden_states, targets.to(hidden_states.device))


class _Projection(nn.Module):
    """A head's forward pass without its hooks."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.project = head, head.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)


@contextmanager
def _replaced_forward(module: nn.Module, function: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the forward pass of `module`, so that its hooks run once, around `function`; FSDP2's gather its weights.

    A head class of our own, whose forward accepts targets, would not do: LoRA's layer passes the targets to the layer
    inside and adds its update to the loss, and `resize_token_embeddings` replaces the head by an `nn.Linear`.
    """
    own = vars(module).get("forward")
    module.forward = function  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


def check_skip_logits(labels: Tensor | None, logits_to_keep: int | Tensor = 0) -> None:
    """Raise ValueError if a forward pass without logits would return nothing, or was asked for logits as well."""
    if labels is None:
        raise ValueError("skip_logits=True returns only the loss, got no labels; pass labels, or leave skip_logits out")
    if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep:
        raise ValueError(f"skip_logits=True keeps no logits, got logits_to_keep={logits_to_keep}; give one of the two")
