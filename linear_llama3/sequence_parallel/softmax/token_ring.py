"""TokenRing (arXiv 2412.20501): queries go round the ring, their partial outputs straight back; K and V stay.

A rank attends with the queries it holds to its own keys and sends (out, lse) to their owner while the queries travel
on, against that direction: both directions of a link work. The public code has no backward pass. Here the bundle
(q, d_out, lse, delta) travels like the queries, every rank adds to the gradients of its own keys and values, which
never move, and sends back the gradient of the queries. delta = rowsum(d_out * out).

With the zigzag layout a block loses its first half of rows at the end of the ring (the paper's half-Q saving): see
`route.py`. Partial results travel in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...ops.precision import without_autocast
from ...ops.softmax_attention import BlockAttention, BlockAttentionBackward, output_with_delta
from ...ops.visibility import Visibility
from ..collectives import Transfer, send_receive
from ..part import Part
from .route import Route, route_of_queries


def token_ring(
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
    return _TokenRing.apply(q, k, v, group, part, scale, visibility)


class _TokenRing(torch.autograd.Function):
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
        rank, route = part.rank, route_of_queries(part, visibility)
        options: dict[str, Any] = {"value_dim": v.shape[-1], "scale": scale, "visibility": visibility}
        own = BlockAttention(q, part.spans, **options)
        held, partial = q, q[:, :0]
        for t in range(route.steps + 1):  # the last one only brings results home
            transfer = _exchange([held], partial, route, rank, t, group)
            if t == 0:
                own.add(k, v, part.spans)
            elif t < route.steps:
                busy = route.busy(rank, t)
                block = BlockAttention(route.select(held, rank, t, busy), route.spans(rank, t, busy), **options)
                block.add(k, v, part.spans)
                out, lse = block.result()
                partial = torch.cat([out, lse.mT.unsqueeze(-1)], dim=-1)  # [B, n, H_q, D_v + 1]
            held, home = transfer.wait()
            for where, rows in _home(home, route, rank, t - 1):
                own.merge(rows[..., :-1], rows[..., -1].mT, where)
        out, lse = own.result()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.part, ctx.scale, ctx.visibility, ctx.route = group, part, scale, visibility, route
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        part, route, rank, key_dim = ctx.part, ctx.route, ctx.part.rank, q.shape[-1]
        delta = (d_out * out).sum(-1)
        held = [torch.cat([q, d_out.to(q.dtype)], dim=-1), torch.stack([lse.mT, delta], dim=-1)]
        d_q, d_k, d_v = (torch.zeros_like(x, dtype=out.dtype) for x in (q, k, v))
        partial = d_q[:, :0]
        for t in range(route.steps + 1):
            transfer = _exchange(held, partial, route, rank, t, ctx.group)
            if t < route.steps:
                busy = route.busy(rank, t)
                rows, sums = (route.select(x, rank, t, busy) for x in held)
                query, d_rows, lse_rows = rows[..., :key_dim], rows[..., key_dim:].to(out.dtype), sums[..., 0].mT
                block = BlockAttentionBackward(
                    query,
                    route.spans(rank, t, busy),
                    output_with_delta(d_rows, sums[..., 1]),
                    lse_rows,
                    d_rows,
                    scale=ctx.scale,
                    visibility=ctx.visibility,
                )
                block.add(k, v, part.spans, d_k, d_v)
                partial = block.result()
                if t == 0:
                    d_q += partial
            *held, home = transfer.wait()
            for where, rows in _home(home, route, rank, t - 1):
                d_q[:, where] += rows
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None, None


def _exchange(
    held: list[Tensor], partial: Tensor, route: Route, rank: int, step: int, group: dist.ProcessGroup
) -> Transfer:
    """Hands on the queries held, and sends what was computed in the last step home to its owner."""
    onward, upcoming, visitor = route.onward(rank, step), route.held(rank, step + 1), route.visitor(rank, step - 1)
    sends = [(route.select(x, rank, step, onward), route.visitor(rank, 1)) for x in held]
    receives = [(route.empty(x, rank, step + 1, upcoming), route.owner(rank, 1)) for x in held]
    if step < 2:  # the first queries were one's own: nothing to send
        home = partial[:, :0].contiguous()
    else:
        home = route.empty(partial, visitor, step - 1, route.busy(visitor, step - 1))
        sends.append((partial, route.owner(rank, step - 1)))
    return send_receive(sends, [*receives, (home, visitor)], group)


def _home(home: Tensor, route: Route, rank: int, step: int) -> Iterator[tuple[slice, Tensor]]:
    """What came back from the visitor of `step`: rows of this rank's own block, and the result for them."""
    if step < 1:
        return
    start = 0
    for where in route.rows(rank, 0, route.held(rank, 0), route.busy(route.visitor(rank, step), step)):
        stop = start + where.stop - where.start
        yield where, home[:, start:stop]
        start = stop
