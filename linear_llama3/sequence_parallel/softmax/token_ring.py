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
from functools import partial

import torch
from torch import Tensor

from ...ops.softmax_attention import BlockAttention, BlockAttentionBackward, output_with_delta
from ..collectives import Transfer, send_receive
from .route import Route, route_of_queries
from .strategy import AttentionSpec, Gradients, Residuals, differentiable, split


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Residuals]:
    shard, visibility = spec.shard, spec.visibility
    rank, route = shard.rank, route_of_queries(shard, visibility)
    attention = partial(BlockAttention, value_dim=v.shape[-1], scale=spec.scale, visibility=visibility)
    own = attention(q, shard.spans)
    held, results = q, q[:, :0]
    for t in range(route.steps + 1):  # the last one only brings results home
        transfer = _exchange([held], results, route, t, spec)
        if t == 0:
            own.add(k, v, shard.spans)
        elif t < route.steps:
            visible = route.visible(rank, t)
            block = attention(route.select(held, rank, t, visible), route.spans(rank, t, visible))
            block.add(k, v, shard.spans)
            out, lse = block.result()
            results = torch.cat([out, lse.mT.unsqueeze(-1)], dim=-1)  # [B, n, H_q, D_v + 1]
        held, home = transfer.wait()
        for where, rows in _home(home, route, rank, t - 1):
            own.merge(rows[..., :-1], rows[..., -1].mT, where)
    out, lse = own.result()
    return out, (out, lse)


def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, residuals: Residuals, spec: AttentionSpec) -> Gradients:
    out, lse = residuals
    shard, visibility, key_dim = spec.shard, spec.visibility, q.shape[-1]
    rank, route = shard.rank, route_of_queries(shard, visibility)
    attention = partial(BlockAttentionBackward, scale=spec.scale, visibility=visibility)
    delta = (d_out * out).sum(-1)
    held = [torch.cat([q, d_out.to(q.dtype)], dim=-1), torch.stack([lse.mT, delta], dim=-1)]
    d_q, d_k, d_v = (torch.zeros_like(x, dtype=out.dtype) for x in (q, k, v))
    results = d_q[:, :0]
    for t in range(route.steps + 1):
        transfer = _exchange(held, results, route, t, spec)
        if t < route.steps:
            visible = route.visible(rank, t)
            rows, sums = (route.select(x, rank, t, visible) for x in held)
            queries, d_rows = split(rows, key_dim)
            lse_rows, delta_rows = sums.unbind(-1)
            d_rows = d_rows.to(out.dtype)
            out_rows = output_with_delta(d_rows, delta_rows)
            block = attention(queries, route.spans(rank, t, visible), out_rows, lse_rows.mT, d_rows)
            block.add(k, v, shard.spans, d_k, d_v)
            results = block.result()
            if t == 0:
                d_q += results
        *held, home = transfer.wait()
        for where, rows in _home(home, route, rank, t - 1):
            d_q[:, where] += rows
    return d_q, d_k, d_v


def _exchange(held: list[Tensor], results: Tensor, route: Route, step: int, spec: AttentionSpec) -> Transfer:
    """Forward the queries held, and return the results of the last step to their source."""
    rank = spec.shard.rank
    forwarded, upcoming, holder = route.forwarded(rank, step), route.held(rank, step + 1), route.holder(rank, step - 1)
    sends = [(route.select(x, rank, step, forwarded), route.holder(rank, 1)) for x in held]
    receives = [(route.empty(x, rank, step + 1, upcoming), route.source_rank(rank, 1)) for x in held]
    if step < 2:  # the first queries were this rank's own: nothing to send
        home = results[:, :0].contiguous()
    else:
        home = route.empty(results, holder, step - 1, route.visible(holder, step - 1))
        sends.append((results, route.source_rank(rank, step - 1)))
    return send_receive(sends, [*receives, (home, holder)], spec.group)


def _home(home: Tensor, route: Route, rank: int, step: int) -> Iterator[tuple[slice, Tensor]]:
    """The results from the holder of `step`, with their rows in this rank's own block."""
    if step < 1:
        return iter(())
    return route.returned(home, rank, route.visible(route.holder(rank, step), step))


token_ring = differentiable(forward, backward)
