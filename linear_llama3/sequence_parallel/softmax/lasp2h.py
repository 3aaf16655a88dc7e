"""LASP-2H (arXiv 2502.07563, Algorithm 7): all-gather of K and V, reduce-scatter of their gradients.

The published algorithm has no causal mask and no backward; here a rank attends with its own keys while the others
are on their way, and then only with those of the gathered keys that its queries see.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...ops.softmax_attention import BlockAttention, BlockAttentionBackward, Visibility
from ..collectives import all_gather, reduce_scatter, world_size
from ..layout import Part

Span = tuple[int, int]


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
    """q `[B, C, H_q, D]`, k `[B, C, H_kv, D]`, v `[B, C, H_kv, D_v]`, padding included; `part` is what they hold.

    Returns out `[B, C, H_q, D_v]` in the working precision, zero at padding.
    """
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
        tokens, (local, key_dim) = part.tokens, (k.shape[1], k.shape[-1])
        pending = all_gather(torch.cat([k, v], dim=-1), group)  # H_kv heads: not expanded under GQA
        block = BlockAttention(q[:, :tokens], part.start, value_dim=v.shape[-1], scale=scale, visibility=visibility)
        block.add(k[:, :tokens], v[:, :tokens], part.start)  # needs no other rank: runs while K and V travel

        gathered = pending.wait()  # [W, B, C, H_kv, D + D_v]
        spans = _visible_spans(part, visibility)
        remote = [_tokens(gathered, a, b) for a, b in spans]  # copies: the rest of the buffer is freed
        for (a, _), keys_values in zip(spans, remote, strict=True):
            block.add(*_split(keys_values, key_dim), a)
        out, lse = block.result()

        ctx.save_for_backward(q, k, v, out, lse, *remote)
        ctx.group, ctx.part, ctx.scale, ctx.visibility, ctx.spans = group, part, scale, visibility, spans
        return torch.cat([out, out.new_zeros(out.shape[0], local - tokens, *out.shape[2:])], dim=1)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *remote = ctx.saved_tensors
        part, key_dim = ctx.part, k.shape[-1]
        tokens, (batch, local, heads, _) = part.tokens, k.shape
        block = BlockAttentionBackward(
            q[:, :tokens], part.start, out, lse, d_out[:, :tokens], scale=ctx.scale, visibility=ctx.visibility
        )
        ranks, width = world_size(ctx.group), key_dim + v.shape[-1]
        gradients = out.new_zeros(batch, ranks * local, heads, width)  # of every rank's K and V
        for (a, b), keys_values in zip(ctx.spans, remote, strict=True):
            block.add(*_split(keys_values, key_dim), a, *_split(gradients[:, a:b], key_dim))
        by_rank = gradients.unflatten(1, (ranks, local)).movedim(1, 0)
        pending = reduce_scatter(by_rank, ctx.group)

        own = out.new_zeros(batch, local, heads, width)  # while the others' gradients travel
        d_key, d_value = _split(own[:, :tokens], key_dim)
        block.add(k[:, :tokens], v[:, :tokens], part.start, d_key, d_value)
        d_q = torch.zeros_like(q)
        d_q[:, :tokens] = block.result()
        d_k, d_v = _split(own + pending.wait(), key_dim)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None, None, None


def _visible_spans(part: Part, visibility: Visibility) -> list[Span]:
    """The other ranks' tokens that some query of this rank sees: before its own and, without a mask, behind."""
    if not part.tokens:
        return []
    spans = [(visibility.first_key(part.start), part.start)]
    if not visibility.causal:
        spans.append((part.stop, min(edge for edge in visibility.documents if edge >= part.stop)))
    return [(a, b) for a, b in spans if a < b]


def _tokens(gathered: Tensor, start: int, stop: int) -> Tensor:
    """Global tokens [start, stop) `[B, stop - start, H, D]` out of `[W, B, C, H, D]`."""
    local = gathered.shape[2]
    first = start // local
    ranks = gathered[first : -(-stop // local)].movedim(0, 1).flatten(1, 2)
    return ranks[:, start - first * local : stop - first * local].clone()


def _split(keys_values: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
    return keys_values[..., :key_dim], keys_values[..., key_dim:]
