"""LASP-2H (arXiv 2502.07563, Algorithm 7): all-gather of K and V, reduce-scatter of their gradients.

The published algorithm has no causal mask and no backward; here a rank attends with its own keys while the others
are on their way, and then only with those of the gathered keys that its queries see.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.softmax_attention import BlockAttention, BlockAttentionBackward
from ...ops.visibility import Span, Visibility
from ..collectives import all_gather, reduce_scatter
from ..layout import by_rank, in_order
from ..part import Part
from .strategy import Gradients, Kept, Setting, differentiable, split


def forward(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> tuple[Tensor, Kept]:
    part, visibility, key_dim = setting.part, setting.visibility, k.shape[-1]
    own = torch.cat([k, v], dim=-1)  # H_kv heads: not expanded under GQA
    pending = all_gather(F.pad(own, (0, 0, 0, 0, 0, part.local - part.tokens)), setting.group)
    block = BlockAttention(q, part.spans, value_dim=v.shape[-1], scale=setting.scale, visibility=visibility)
    block.add(k, v, part.spans)  # needs no other rank: runs while K and V travel

    gathered = in_order(pending.wait().movedim(0, 1), part.layout, dim=1)  # [B, W * C, H_kv, D + D_v]
    spans = _visible_spans(part, visibility)
    remote = [gathered[:, a:b].clone() for a, b in spans]  # the rest of the buffer is freed
    del gathered
    for span, keys_values in zip(spans, remote, strict=True):
        block.add(*split(keys_values, key_dim), [span])
    out, lse = block.result()
    return out, (out, lse, *remote)


def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Kept, setting: Setting) -> Gradients:
    out, lse, *remote = kept
    part, visibility, key_dim = setting.part, setting.visibility, k.shape[-1]
    block = BlockAttentionBackward(q, part.spans, out, lse, d_out, scale=setting.scale, visibility=visibility)
    # of every rank's K and V, in the order of the sequence
    gradients = out.new_zeros(k.shape[0], part.ranks * part.local, k.shape[2], key_dim + v.shape[-1])
    for (a, b), keys_values in zip(_visible_spans(part, visibility), remote, strict=True):
        block.add(*split(keys_values, key_dim), [(a, b)], *split(gradients[:, a:b], key_dim))
    pending = reduce_scatter(by_rank(gradients, part.layout, part.ranks, dim=1).movedim(1, 0), setting.group)

    own = out.new_zeros(*k.shape[:3], key_dim + v.shape[-1])  # while the others' gradients travel
    block.add(k, v, part.spans, *split(own, key_dim))
    d_k, d_v = split(own + pending.wait()[:, : part.tokens], key_dim)
    return block.result(), d_k, d_v


def _visible_spans(part: Part, visibility: Visibility) -> list[Span]:
    """The other ranks' tokens that some query of this rank sees: before, between and behind its own chunks."""
    own = [span for span in part.spans if span[0] < span[1]]
    spans: list[Span] = []
    start = 0  # of the gap before a span of one's own
    for n, (a, b) in enumerate(own):
        spans.append((max(start, visibility.first_key(a)), a))
        following = own[n + 1][0] if n + 1 < len(own) else part.documents[-1]
        start = min(visibility.last_key(b - 1) + 1, following)
        spans.append((b, start))
    return [(a, b) for a, b in spans if a < b]


lasp2h = differentiable(forward, backward)
