"""LASP-2H (arXiv 2502.07563, Algorithm 7): all-gather of K and V, reduce-scatter of their gradients.

The published algorithm has no causal mask and no backward; here a rank attends with its own keys while the others
are on their way, and then only with those of the gathered keys that its queries see.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.softmax_attention import BlockAttention, BlockAttentionBackward
from ...ops.visibility import Span, Visibility
from ..collectives import all_gather, reduce_scatter
from ..layout import to_rank_order, to_sequence_order
from ..sequence_shard import SequenceShard
from .strategy import AttentionSpec, Gradients, Residuals, differentiable, split


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Residuals]:
    shard, visibility, key_dim = spec.shard, spec.visibility, k.shape[-1]
    wait = _start_gather(k, v, spec)
    block = BlockAttention(q, shard.spans, value_dim=v.shape[-1], scale=spec.scale, visibility=visibility)
    block.add(k, v, shard.spans)  # needs no other rank: runs while K and V travel

    remote = wait()
    for span, keys_values in zip(_visible_spans(shard, visibility), remote, strict=True):
        block.add(*split(keys_values, key_dim), [span])
    out, lse = block.result()
    if spec.exchange_cache is not None:  # K and V of all ranks in every layer: gathered again, not kept
        return out, (out, lse)
    return out, (out, lse, *remote)


def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, residuals: Residuals, spec: AttentionSpec) -> Gradients:
    out, lse, *remote = residuals
    if spec.exchange_cache is not None:
        remote = _start_gather(k, v, spec)()
    shard, visibility, key_dim = spec.shard, spec.visibility, k.shape[-1]
    block = BlockAttentionBackward(q, shard.spans, out, lse, d_out, scale=spec.scale, visibility=visibility)
    # of every rank's K and V, in the order of the sequence
    gradients = out.new_zeros(k.shape[0], shard.ranks * shard.local, k.shape[2], key_dim + v.shape[-1])
    for (a, b), keys_values in zip(_visible_spans(shard, visibility), remote, strict=True):
        block.add(*split(keys_values, key_dim), [(a, b)], *split(gradients[:, a:b], key_dim))
    pending = reduce_scatter(to_rank_order(gradients, shard.layout, shard.ranks, dim=1).movedim(1, 0), spec.group)

    own = out.new_zeros(*k.shape[:3], key_dim + v.shape[-1])  # while the others' gradients travel
    block.add(k, v, shard.spans, *split(own, key_dim))
    d_k, d_v = split(own + pending.wait()[:, : shard.tokens], key_dim)
    return block.result(), d_k, d_v


def _start_gather(k: Tensor, v: Tensor, spec: AttentionSpec) -> Callable[[], list[Tensor]]:
    """Send K and V; the result waits for the `_visible_spans` of the other ranks' ones, [B, n, H_kv, D + D_v]."""
    shard, visibility = spec.shard, spec.visibility
    own = torch.cat([k, v], dim=-1)  # H_kv heads: not expanded under GQA
    pending = all_gather(F.pad(own, (0, 0, 0, 0, 0, shard.local - shard.tokens)), spec.group)

    def wait() -> list[Tensor]:
        gathered = to_sequence_order(pending.wait().movedim(0, 1), shard.layout, dim=1)  # [B, W * C, H_kv, D + D_v]
        return [gathered[:, a:b].clone() for a, b in _visible_spans(shard, visibility)]  # the rest of it is freed

    return wait


def _visible_spans(shard: SequenceShard, visibility: Visibility) -> list[Span]:
    """The other ranks' tokens that some query of this rank sees: before, between and after its own chunks."""
    own = [span for span in shard.spans if span[0] < span[1]]
    spans: list[Span] = []
    start = 0  # of the gap before an own span
    for n, (a, b) in enumerate(own):
        spans.append((max(start, visibility.first_key(a)), a))
        following = own[n + 1][0] if n + 1 < len(own) else shard.documents[-1]
        start = min(visibility.last_key(b - 1) + 1, following)
        spans.append((b, start))
    return [(a, b) for a, b in spans if a < b]


lasp2h = differentiable(forward, backward)
