"""Ring Attention (arXiv 2310.01889): K and V go round the ring of ranks, queries stay.

While a rank attends with one block of keys, the next one is on its way. In the backward pass K and V go round again,
and the gradients of a block travel behind it, summed from rank to rank; the last rank that sees the block returns them
to its source, whose own share never travels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ...ops.softmax_attention import BlockAttention, BlockAttentionBackward
from ..collectives import Transfer, send_receive
from .route import Step, route_of_keys
from .strategy import AttentionSpec, Gradients, Residuals, differentiable, split


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Residuals]:
    shard, visibility, key_dim = spec.shard, spec.visibility, k.shape[-1]
    block = BlockAttention(q, shard.spans, value_dim=v.shape[-1], scale=spec.scale, visibility=visibility)
    held = torch.cat([k, v], dim=-1)  # [B, n, H_kv, D + D_v]
    for step in route_of_keys(shard, visibility):
        upcoming = _pass_on(held, step, spec)
        block.add(*split(held, key_dim), step.held.spans)
        (held,) = upcoming.wait()
    out, lse = block.result()
    return out, (out, lse)


def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, residuals: Residuals, spec: AttentionSpec) -> Gradients:
    out, lse = residuals
    shard, visibility, key_dim = spec.shard, spec.visibility, k.shape[-1]
    block = BlockAttentionBackward(q, shard.spans, out, lse, d_out, scale=spec.scale, visibility=visibility)
    held = torch.cat([k, v], dim=-1)
    own = torch.zeros_like(held, dtype=out.dtype)  # the gradients of this rank's K and V
    route = route_of_keys(shard, visibility)
    behind = None
    for before, step in pairwise([route[0], *route]):
        upcoming = _pass_on(held, step, spec)
        gradients = own if step is route[0] else torch.zeros_like(held, dtype=out.dtype)
        block.add(*split(held, key_dim), step.held.spans, *split(gradients, key_dim))
        if behind is not None:
            earlier, home = behind.wait()
            gradients += earlier
            for where, rows in before.finished_by_holder.split(home):
                own[:, where] += rows
        if step is not route[0]:
            behind = _pass_gradients_on(gradients, step, spec)
        (held,) = upcoming.wait()
    d_k, d_v = split(own, key_dim)
    return block.result(), d_k, d_v


def _pass_on(held: Tensor, step: Step, spec: AttentionSpec) -> Transfer:
    """Forward the chunks that later ranks need; receive the block of the next step."""
    sends, receives = (step.forwarded.of(held), step.next_rank), (step.arriving.empty(held), step.previous_rank)
    return send_receive([sends], [receives], spec.group)


def _pass_gradients_on(gradients: Tensor, step: Step, spec: AttentionSpec) -> Transfer:
    """Send the gradients of the block held after it or back to its source; receive those of the next block and of this
    rank's own chunks."""
    sends = [(step.forwarded.of(gradients), step.next_rank), (step.finished.of(gradients), step.source)]
    receives = [
        (step.arriving.empty(gradients), step.previous_rank),
        (step.finished_by_holder.empty(gradients), step.holder),
    ]
    return send_receive(sends, receives, spec.group)


ring = differentiable(forward, backward)
