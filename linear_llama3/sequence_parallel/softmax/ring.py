"""Ring Attention (arXiv 2310.01889): K and V go round the ring of ranks, queries stay.

While a rank attends with one block of keys, the next one is on its way. In the backward pass K and V go round again,
and the gradients of a block travel behind it, summed from rank to rank; the last rank that sees the block returns them
to its source, whose own share never travels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.softmax_attention import BlockAttention, BlockAttentionBackward
from ..collectives import Transfer, send_receive
from .route import Route, route_of_keys
from .strategy import AttentionSpec, Gradients, Residuals, differentiable, split


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Residuals]:
    shard, visibility, key_dim = spec.shard, spec.visibility, k.shape[-1]
    rank, route = shard.rank, route_of_keys(shard, visibility)
    block = BlockAttention(q, shard.spans, value_dim=v.shape[-1], scale=spec.scale, visibility=visibility)
    held = torch.cat([k, v], dim=-1)  # [B, n, H_kv, D + D_v]
    for t in range(route.steps):
        upcoming = _pass_on(held, route, t, spec)
        block.add(*split(held, key_dim), route.spans(rank, t, route.held(rank, t)))
        (held,) = upcoming.wait()
    out, lse = block.result()
    return out, (out, lse)


def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, residuals: Residuals, spec: AttentionSpec) -> Gradients:
    out, lse = residuals
    shard, visibility, key_dim = spec.shard, spec.visibility, k.shape[-1]
    rank, route = shard.rank, route_of_keys(shard, visibility)
    block = BlockAttentionBackward(q, shard.spans, out, lse, d_out, scale=spec.scale, visibility=visibility)
    held = torch.cat([k, v], dim=-1)
    own = torch.zeros_like(held, dtype=out.dtype)  # the gradients of this rank's K and V
    behind = None
    for t in range(route.steps):
        upcoming = _pass_on(held, route, t, spec)
        gradients = torch.zeros_like(held, dtype=out.dtype) if t else own
        spans = route.spans(rank, t, route.held(rank, t))
        block.add(*split(held, key_dim), spans, *split(gradients, key_dim))
        if behind is not None:
            gradients += _arrived(behind, own, route, rank, t - 1)
        if t:
            behind = _pass_gradients_on(gradients, route, t, spec)
        (held,) = upcoming.wait()
    if behind is not None:
        _arrived(behind, own, route, rank, route.steps - 1)
    d_k, d_v = split(own, key_dim)
    return block.result(), d_k, d_v


def _pass_on(held: Tensor, route: Route, step: int, spec: AttentionSpec) -> Transfer:
    """Forward the chunks that later ranks need; receive the block of the next step from the previous rank."""
    rank = spec.shard.rank
    send = route.select(held, rank, step, route.forwarded(rank, step))
    receive = route.empty(held, rank, step + 1, route.held(rank, step + 1))
    return send_receive([(send, route.holder(rank, 1))], [(receive, route.source_rank(rank, 1))], spec.group)


def _pass_gradients_on(gradients: Tensor, route: Route, step: int, spec: AttentionSpec) -> Transfer:
    """Send the gradients of the block held after it or back to its source; receive those of the next block and of this
    rank's own chunks."""
    rank = spec.shard.rank
    following = route.select(gradients, rank, step, route.forwarded(rank, step))
    going_home = route.select(gradients, rank, step, route.finished(rank, step))
    holder = route.holder(rank, step)
    expected = route.empty(gradients, rank, step + 1, route.held(rank, step + 1))
    coming_home = route.empty(gradients, holder, step, route.finished(holder, step))
    sends = [(following, route.holder(rank, 1)), (going_home, route.source_rank(rank, step))]
    return send_receive(sends, [(expected, route.source_rank(rank, 1)), (coming_home, holder)], spec.group)


def _arrived(transfer: Transfer, own: Tensor, route: Route, rank: int, step: int) -> Tensor:
    """Add to `own` what was returned after `step`; return the gradients that follow the block of the next step."""
    following, home = transfer.wait()
    for where, rows in route.returned(home, rank, route.finished(route.holder(rank, step), step)):
        own[:, where] += rows
    return following


ring = differentiable(forward, backward)
