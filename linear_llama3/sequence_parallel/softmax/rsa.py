"""Ring Self-Attention (RSA, arXiv 2105.13120): the exact scores of a rank's queries with all keys, in two rings.

K goes round the ring and fills the rows of scores column by column; after an ordinary softmax over whole rows, V goes
round. In the backward pass V goes round for the gradient of the weights and K for that of the queries; the gradients
of K and V are summed by one reduce-scatter. The scores take B * H_q * C * T numbers: a baseline of the literature,
not a way to long sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...ops.precision import without_autocast, working_dtype
from ...ops.visibility import Visibility
from ..collectives import reduce_scatter, send_receive
from ..part import Part, count


def rsa(
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
    return _RingSelfAttention.apply(q, k, v, group, part, scale, visibility)


class _RingSelfAttention(torch.autograd.Function):
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
        work, heads = working_dtype(q), k.shape[2]
        queries = _by_head(q, heads).to(work)  # [B, H_kv, G, n, D]
        scores = queries.new_empty(*queries.shape[:4], part.documents[-1])
        for columns, keys in _round(k, part, group):
            scores[..., columns] = scale * (queries @ _by_head(keys, heads).to(work).mT)
        p = scores.masked_fill_(~_visible(part, visibility, q.device), -torch.inf).softmax(-1)
        out = torch.zeros(*queries.shape[:4], v.shape[-1], dtype=work, device=q.device)
        for columns, values in _round(v, part, group):
            out += p[..., columns] @ _by_head(values, heads).to(work)
        ctx.save_for_backward(q, k, v, p)
        ctx.group, ctx.part, ctx.scale = group, part, scale
        return _by_token(out)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        part, group, heads = ctx.part, ctx.group, k.shape[2]
        queries, d_out = _by_head(q, heads).to(p.dtype), _by_head(d_out, heads)
        d_p = torch.empty_like(p)
        for columns, values in _round(v, part, group):
            d_p[..., columns] = d_out @ _by_head(values, heads).to(p.dtype).mT
        d_s = ctx.scale * p * (d_p - (d_p * p).sum(-1, keepdim=True))
        d_q = torch.zeros_like(queries)
        for columns, keys in _round(k, part, group):
            d_q += d_s[..., columns] @ _by_head(keys, heads).to(p.dtype)

        gradients = p.new_zeros(part.ranks, k.shape[0], part.local, heads, k.shape[-1] + v.shape[-1])
        for owner, columns in enumerate(_columns(part)):
            d_k, d_v = d_s[..., columns].mT @ queries, p[..., columns].mT @ d_out  # [B, H_kv, G, n, D]
            rows = torch.cat([d_k, d_v], dim=-1).sum(2).transpose(1, 2)
            gradients[owner, :, : rows.shape[1]] = rows
        own = reduce_scatter(gradients, group).wait()[:, : part.tokens]
        d_k, d_v = own.split([k.shape[-1], v.shape[-1]], dim=-1)
        return _by_token(d_q).to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None, None


def _round(x: Tensor, part: Part, group: dist.ProcessGroup) -> Iterator[tuple[slice, Tensor]]:
    """Every rank's tokens `[B, n, H, D]` and their columns, one's own first; the next are on their way meanwhile."""
    columns, ranks = _columns(part), part.ranks
    for t in range(ranks - 1):
        coming = count(part.all_spans[(part.rank - t - 1) % ranks])
        receive = x.new_empty(x.shape[0], coming, *x.shape[2:])
        transfer = send_receive([(x, (part.rank + 1) % ranks)], [(receive, (part.rank - 1) % ranks)], group)
        yield columns[(part.rank - t) % ranks], x
        (x,) = transfer.wait()
    yield columns[(part.rank + 1) % ranks], x


def _columns(part: Part) -> list[slice]:
    """Where the keys of every rank stand in the rows of scores."""
    stops = [0]
    for spans in part.all_spans:
        stops.append(stops[-1] + count(spans))
    return [slice(a, b) for a, b in pairwise(stops)]


def _visible(part: Part, visibility: Visibility, device: torch.device) -> Tensor:
    """Bool `[n, T]`, keys in the order of the columns."""
    positions = [[torch.arange(a, b, device=device) for a, b in spans] for spans in part.all_spans]
    return visibility.mask(torch.cat(positions[part.rank]), torch.cat([x for own in positions for x in own]))


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, n, H, D]` to `[B, H_kv, G, n, D]`, G = 1 for keys and values."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _by_token(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)
