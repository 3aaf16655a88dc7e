"""TokenRing (arXiv 2412.20501): queries go round the ring, their partial outputs straight back; K and V stay.

A rank attends with the queries it holds to its own keys and sends (out, lse) to their owner while the queries travel
on, against that direction: both directions of a link work. The public code has no backward pass. Here the bundle
(q, d_out, lse, delta) travels like the queries, every rank adds to the gradients of its own keys and values, which
never move, and sends back the gradient of the queries. delta = rowsum(d_out * out).

With the zigzag layout a block loses its first half of rows at the end of the ring (the paper's half-Q saving): see
`route.py`. Partial results travel in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ...ops.softmax_attention import BlockAttention, BlockAttentionBackward, output_with_delta
from ..collectives import Transfer, send_receive
from .route import Step, route_of_queries
from .strategy import AttentionSpec, Gradients, Residuals, differentiable, split


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Residuals]:
    shard, visibility = spec.shard, spec.visibility
    attention = partial(BlockAttention, value_dim=v.shape[-1], scale=spec.scale, visibility=visibility)
    own = attention(q, shard.spans)
    held, results = q, q[:, :0]
    route = route_of_queries(shard, visibility)
    for before, step in pairwise([route[0], *route]):
        transfer = _exchange([held], results, before, step, spec)
        if step is route[0]:
            own.add(k, v, shard.spans)
        else:
            block = attention(step.visible.of(held), step.visible.spans)
            block.add(k, v, shard.spans)
            out, lse = block.result()
            results = torch.cat([out, lse.mT.unsqueeze(-1)], dim=-1)  # [B, n, H_q, D_v + 1]
        held, home = transfer.wait()
        for where, rows in before.visible_to_holder.split(home):
            own.merge(rows[..., :-1], rows[..., -1].mT, where)
    out, lse = own.result()
    return out, (out, lse)


def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, residuals: Residuals, spec: AttentionSpec) -> Gradients:
    out, lse = residuals
    shard, visibility, key_dim = spec.shard, spec.visibility, q.shape[-1]
    attention = partial(BlockAttentionBackward, scale=spec.scale, visibility=visibility)
    delta = (d_out * out).sum(-1)
    held = [torch.cat([q, d_out.to(q.dtype)], dim=-1), torch.stack([lse.mT, delta], dim=-1)]
    d_q, d_k, d_v = (torch.zeros_like(x, dtype=out.dtype) for x in (q, k, v))
    results = d_q[:, :0]
    route = route_of_queries(shard, visibility)
    for before, step in pairwise([route[0], *route]):
        transfer = _exchange(held, results, before, step, spec)
        rows, sums = (step.visible.of(x) for x in held)
        queries, d_rows = split(rows, key_dim)
        lse_rows, delta_rows = sums.unbind(-1)
        d_rows = d_rows.to(out.dtype)
        block = attention(queries, step.visible.spans, output_with_delta(d_rows, delta_rows), lse_rows.mT, d_rows)
        block.add(k, v, shard.spans, d_k, d_v)
        if step is route[0]:
            d_q += block.result()
        else:
            results = block.result()
        *held, home = transfer.wait()
        for where, rows in before.visible_to_holder.split(home):
            d_q[:, where] += rows
    return d_q, d_k, d_v


def _exchange(held: list[Tensor], results: Tensor, before: Step, step: Step, spec: AttentionSpec) -> Transfer:
    """Forward the queries held, and return the results of the step before to their source."""
    sends = [(step.forwarded.of(x), step.next_rank) for x in held] + [(results, before.source)]
    receives = [(step.arriving.empty(x), step.previous_rank) for x in held]
    home = before.visible_to_holder.empty(results)
    return send_receive(sends, [*receives, (home, before.holder)], spec.group)


token_ring = differentiable(forward, backward)
