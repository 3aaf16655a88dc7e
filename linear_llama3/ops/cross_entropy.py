"""Cross-entropy of a language model without the logits of all tokens at once.

The head is applied to some tokens at a time, `[n, V]` logits. Gradients are computed on the spot, from those of the
logits z, softmax(z) - onehot(target), and only those of the hidden states and of the head's parameters are kept: the
backward pass only scales them by the gradient of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .precision import working_dtype
from .token_tiles import tile_tokens

IGNORE_INDEX = -100  # transformers' label of a token without loss


@torch.compiler.disable  # the number of chunks depends on the labels
def chunked_cross_entropy(
    hidden_states: Tensor, targets: Tensor, head: nn.Module, *, vocab_size: int, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Compute the sum of the cross-entropies of `head(hidden_states)`, 0 where no token has a target.

    Equal to that of all logits, to rounding. Differentiable once. The gradients of the head's parameters are summed
    over the chunks in float32; frozen ones get none. Tokens without a target cost nothing.

    Args:
        hidden_states: `[..., D]`.
        targets: `[...]`, integers below `vocab_size`, or `ignore_index`.
        head: treats every token by itself, `[n, D]` to `[n, V]`. Its parameters may be tied to others.
        vocab_size: V.

    Returns:
        A number in float32, in float64 for float64 hidden states.
    """
    learned = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    learns = torch.is_grad_enabled()  # not known inside
    arguments = head, tuple(learned), tile_tokens(vocab_size), ignore_index, learns
    return _ChunkedCrossEntropy.apply(hidden_states.flatten(0, -2), targets.flatten(), *arguments, *learned.values())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        targets: Tensor,
        head: nn.Module,
        names: tuple[str, ...],
        size: int,
        ignore_index: int,
        learns: bool,
        *parameters: Tensor,
    ) -> Tensor:
        # separate leaves: a hook on a parameter expects its complete gradient, once
        leaves = [parameter.detach().requires_grad_(learns) for parameter in parameters]
        x = hidden_states.detach().requires_grad_(learns and ctx.needs_input_grad[0])
        sums = [torch.zeros_like(leaf, dtype=working_dtype(leaf)) for leaf in leaves] if learns else []
        d_hidden = torch.zeros_like(x) if x.requires_grad else None
        total = x.new_zeros((), dtype=torch.float64)
        for rows in (targets != ignore_index).nonzero().squeeze(1).split(size):
            with torch.set_grad_enabled(learns):
                loss, gradients = _chunk(head, dict(zip(names, leaves, strict=True)), x, rows, targets)
            total += loss
            for d_sum, gradient in zip(sums, gradients, strict=False):
                d_sum += gradient
            if d_hidden is not None:
                d_hidden[rows] = gradients[-1]
            del gradients  # before the next logits are made
        ctx.save_for_backward(d_hidden, *sums)
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return total.to(working_dtype(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, *sums = ctx.saved_tensors
        d_parameters = [(d_loss * d_sum).to(dtype) for d_sum, dtype in zip(sums, ctx.dtypes, strict=True)]
        return (None if d_hidden is None else d_loss * d_hidden, *[None] * 6, *d_parameters)


def _chunk(
    head: nn.Module, parameters: dict[str, Tensor], hidden_states: Tensor, rows: Tensor, targets: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute the sum over some tokens, and the gradients of the parameters and hidden states that need one."""
    x, targets = hidden_states[rows], targets[rows].unsqueeze(1)
    logits = functional_call(head, parameters, x)
    log_p = logits.detach().log_softmax(-1, dtype=working_dtype(logits))
    loss = -log_p.gather(1, targets).sum(dtype=torch.float64)
    if not logits.requires_grad:
        return loss, ()
    d_logits = log_p.exp_().scatter_add_(1, targets, log_p.new_full(targets.shape, -1)).to(logits.dtype)
    del log_p
    inputs = [*parameters.values(), *([x] if x.requires_grad else [])]
    # a parameter may take no part, as those of an adapter that is switched off
    return loss, torch.autograd.grad(logits, inputs, d_logits, materialize_grads=True)
