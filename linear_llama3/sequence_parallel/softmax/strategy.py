"""The interface of strategies for softmax layers, and their way into autograd.

A strategy is a differentiable function `strategy(q, k, v, spec) -> out`. Most are made of two plain functions, a
forward pass and the backward pass that belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...ops.precision import without_autocast
from ...ops.visibility import Visibility
from ..sequence_shard import SequenceShard


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The arguments of a strategy in addition to q, k and v."""

    group: dist.ProcessGroup  # of more than one rank
    shard: SequenceShard  # which tokens this rank and the others hold
    scale: float
    visibility: Visibility  # the mask, in global positions
    exchange_cache: MutableMapping[str, Any] | None = None  # see `softmax_attention`


class SoftmaxStrategy(Protocol):
    """The attention of this rank's true tokens, n of them, none perhaps.

    q `[B, n, H_q, D]`, k `[B, n, H_kv, D]`, H_q a multiple of H_kv, v `[B, n, H_kv, D_v]`; out `[B, n, H_q, D_v]` in
    any precision.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor: ...


Residuals = tuple[Tensor, ...]  # from the forward pass for the backward pass, in addition to q, k and v
Gradients = tuple[Tensor, Tensor, Tensor]
# (q, k, v, spec) -> out, residuals, and (d_out, q, k, v, residuals, spec) -> gradients
Forward = Callable[[Tensor, Tensor, Tensor, AttentionSpec], tuple[Tensor, Residuals]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Residuals, AttentionSpec], Gradients]


def differentiable(forward: Forward, backward: Backward) -> SoftmaxStrategy:
    """The strategy made of these two passes.

    `forward` gives out in the working precision, so d_out comes in it too, without autocast; the gradients that
    `backward` returns in it are cast to the dtype of the inputs here.
    """

    def strategy(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        return _Attention.apply(q, k, v, spec, forward, backward)

    return strategy


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, forward: Forward, backward: Backward
    ) -> Tensor:
        cache = spec.exchange_cache
        if cache:  # filled by the pass that is recomputed
            out, residuals = cache["out"].detach(), cache["residuals"]
        else:
            out, residuals = forward(q, k, v, spec)
            if cache is not None:  # detached: autograd makes `out` part of its graph
                cache["out"], cache["residuals"] = out.detach(), tuple(x.detach() for x in residuals)
        ctx.save_for_backward(q, k, v, *residuals)
        ctx.spec, ctx.run_backward = spec, backward
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *residuals = ctx.saved_tensors
        d_q, d_k, d_v = ctx.run_backward(d_out, q, k, v, tuple(residuals), ctx.spec)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None


def split(keys_values: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
    """K and V that travel as one tensor `[..., D + D_v]`; views, so that gradients can be added to them."""
    return keys_values[..., :key_dim], keys_values[..., key_dim:]
