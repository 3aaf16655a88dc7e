"""Ring Attention (arXiv 2310.01889): K and V go round the ring of ranks, queries stay.

While a rank attends with one block of keys, the next one is on its way. In the backward pass K and V go round again,
and the gradients of a block travel behind it, growing at every rank; the last one to see the block sends them home
to its owner, whose own share never travels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...ops.precision import without_autocast
from ...ops.softmax_attention import BlockAttention, BlockAttentionBackward
from ...ops.visibility import Visibility
from ..collectives import Transfer, send_receive
from ..part import Part
from .route import Route, route_of_keys


def ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup,
    part: Part,
    scale: float,
    visibility: Visibility,
) -> Tensor:
    """See `softmax/attention.py`."""
    return _Ring.apply(q, k, v, group, part, scale, visibility)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        group: dist.ProcessGroup,
        part: Part,
        scale: float,
        visibility: Visibility,
    ) -> Tensor:
        rank, route, key_dim = part.rank, route_of_keys(part, visibility), k.shape[-1]
        block = BlockAttention(q, part.spans, value_dim=v.shape[-1], scale=scale, visibility=visibility)
        held = torch.cat([k, v], dim=-1)  # [B, n, H_kv, D + D_v]
        for t in range(route.steps):
            upcoming = _pass_on(held, route, rank, t, group)
            block.add(*_split(held, key_dim), route.spans(rank, t, route.held(rank, t)))
            (held,) = upcoming.wait()
        out, lse = block.result()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.part, ctx.scale, ctx.visibility, ctx.route = group, part, scale, visibility, route
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        part, group, route, key_dim = ctx.part, ctx.group, ctx.route, k.shape[-1]
        rank = part.rank
        block = BlockAttentionBackward(q, part.spans, out, lse, d_out, scale=ctx.scale, visibility=ctx.visibility)
        held = torch.cat([k, v], dim=-1)
        own = torch.zeros_like(held, dtype=out.dtype)  # the gradients of this rank's K and V
        behind = None
        for t in range(route.steps):
            upcoming = _pass_on(held, route, rank, t, group)
            gradients = torch.zeros_like(held, dtype=out.dtype) if t else own
            spans = route.spans(rank, t, route.held(rank, t))
            block.add(*_split(held, key_dim), spans, *_split(gradients, key_dim))
            if behind is not None:
                gradients += _arrived(behind, own, route, rank, t - 1)
            if t:
                behind = _pass_gradients_on(gradients, route, rank, t, group)
            (held,) = upcoming.wait()
        if behind is not None:
            _arrived(behind, own, route, rank, route.steps - 1)
        d_k, d_v = _split(own, key_dim)
        return block.result().to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None, None


def _pass_on(held: Tensor, route: Route, rank: int, step: int, group: dist.ProcessGroup) -> Transfer:
    """What is still of use ahead goes to the next rank; the block of the next step comes from the last."""
    send = route.select(held, rank, step, route.onward(rank, step))
    receive = route.empty(held, rank, step + 1, route.held(rank, step + 1))
    return send_receive([(send, route.visitor(rank, 1))], [(receive, route.owner(rank, 1))], group)


def _pass_gradients_on(gradients: Tensor, route: Route, rank: int, step: int, group: dist.ProcessGroup) -> Transfer:
    """The gradients of the block held follow it, or go home; those of the next block and of one's own come in."""
    following = route.select(gradients, rank, step, route.onward(rank, step))
    going_home = route.select(gradients, rank, step, route.finished(rank, step))
    visitor = route.visitor(rank, step)
    expected = route.empty(gradients, rank, step + 1, route.held(rank, step + 1))
    coming_home = route.empty(gradients, visitor, step, route.finished(visitor, step))
    sends = [(following, route.visitor(rank, 1)), (going_home, route.owner(rank, step))]
    return send_receive(sends, [(expected, route.owner(rank, 1)), (coming_home, visitor)], group)


def _arrived(transfer: Transfer, own: Tensor, route: Route, rank: int, step: int) -> Tensor:
    """Adds to `own` what came home after `step`; returns what follows the block of the next step."""
    following, home = transfer.wait()
    start = 0
    for where in route.rows(rank, 0, route.held(rank, 0), route.finished(route.visitor(rank, step), step)):
        stop = start + where.stop - where.start
        own[:, where] += home[:, start:stop]
        start = stop
    return following


def _split(keys_values: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
    return keys_values[..., :key_dim], keys_values[..., key_dim:]
