"""LASP-2H (arXiv 2502.07563, Algorithm 7): all-gather of K and V, reduce-scatter of their gradients.

The published algorithm has no causal mask and no backward; here a rank attends with its own keys while the others
are on their way, and then only with those of the gathered keys that its queries see.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...ops.precision import without_autocast
from ...ops.softmax_attention import BlockAttention, BlockAttentionBackward
from ...ops.visibility import Span, Visibility
from ..collectives import all_gather, reduce_scatter
from ..layout import by_rank, in_order
from ..part import Part


def lasp2h(
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
    return _Lasp2H.apply(q, k, v, group, part, scale, visibility)


class _Lasp2H(torch.autograd.Function):
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
        own = torch.cat([k, v], dim=-1)  # H_kv heads: not expanded under GQA
        pending = all_gather(F.pad(own, (0, 0, 0, 0, 0, part.local - part.tokens)), group)
        block = BlockAttention(q, part.spans, value_dim=v.shape[-1], scale=scale, visibility=visibility)
        block.add(k, v, part.spans)  # needs no other rank: runs while K and V travel

        gathered = in_order(pending.wait().movedim(0, 1), part.layout, dim=1)  # [B, W * C, H_kv, D + D_v]
        spans = _visible_spans(part, visibility)
        remote = [gathered[:, a:b].clone() for a, b in spans]  # the rest of the buffer is freed
        del gathered
        for span, keys_values in zip(spans, remote, strict=True):
            block.add(*_split(keys_values, k.shape[-1]), [span])
        out, lse = block.result()

        ctx.save_for_backward(q, k, v, out, lse, *remote)
        ctx.group, ctx.part, ctx.scale, ctx.visibility, ctx.spans = group, part, scale, visibility, spans
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *remote = ctx.saved_tensors
        part, key_dim, (batch, tokens, heads, _) = ctx.part, k.shape[-1], k.shape
        block = BlockAttentionBackward(q, part.spans, out, lse, d_out, scale=ctx.scale, visibility=ctx.visibility)
        # of every rank's K and V, in the order of the sequence
        gradients = out.new_zeros(batch, part.ranks * part.local, heads, key_dim + v.shape[-1])
        for (a, b), keys_values in zip(ctx.spans, remote, strict=True):
            block.add(*_split(keys_values, key_dim), [(a, b)], *_split(gradients[:, a:b], key_dim))
        pending = reduce_scatter(by_rank(gradients, part.layout, part.ranks, dim=1).movedim(1, 0), ctx.group)

        own = out.new_zeros(batch, tokens, heads, key_dim + v.shape[-1])  # while the others' gradients travel
        block.add(k, v, part.spans, *_split(own, key_dim))
        d_k, d_v = _split(own + pending.wait()[:, :tokens], key_dim)
        return block.result().to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None, None


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


def _split(keys_values: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
    return keys_values[..., :key_dim], keys_values[..., key_dim:]
