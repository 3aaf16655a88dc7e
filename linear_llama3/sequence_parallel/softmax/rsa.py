"""Ring Self-Attention (RSA, arXiv 2105.13120): the exact scores of a rank's queries with all keys, in two rings.

K goes round the ring and fills the rows of scores column by column; after an ordinary softmax over whole rows, V goes
round. In the backward pass V goes round for the gradient of the weights and K for that of the queries; the gradients
of K and V are summed by one reduce-scatter. The scores take B * H_q * C * T numbers: a baseline of the literature,
not a way to long sequences.

Every product is taken over visible tiles only, not over whole rows: a weight of 0 would carry nan and inf from one
packed document into another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...ops.precision import working_dtype
from ...ops.visibility import Tile
from ..collectives import reduce_scatter, send_receive
from ..part import count
from .strategy import Gradients, Kept, Setting, differentiable, split


def forward(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> tuple[Tensor, Kept]:
    part = setting.part
    queries = _by_head(q, k.shape[2])  # [B, H_kv, G, n, D]
    scores = queries.new_full((*queries.shape[:4], part.ranks * part.local), -torch.inf)
    for tile, rows, columns, keys in _round(k, setting):
        scores[..., rows, columns] = tile.mask(setting.scale * (queries[..., rows, :] @ keys.mT))
    p = scores.softmax(-1)
    out = queries.new_zeros(*queries.shape[:4], v.shape[-1])
    for _, rows, columns, values in _round(v, setting):
        out[..., rows, :] += p[..., rows, columns] @ values
    return _by_token(out), (p,)


def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Kept, setting: Setting) -> Gradients:
    (p,), part, heads = kept, setting.part, k.shape[2]
    queries, d_out = _by_head(q, heads), _by_head(d_out, heads)
    d_p = torch.zeros_like(p)
    for _, rows, columns, values in _round(v, setting):
        d_p[..., rows, columns] = d_out[..., rows, :] @ values.mT
    d_s = setting.scale * p * (d_p - (d_p * p).sum(-1, keepdim=True))
    d_q = torch.zeros_like(queries)
    for _, rows, columns, keys in _round(k, setting):
        d_q[..., rows, :] += d_s[..., rows, columns] @ keys

    gradients = p.new_zeros(part.ranks, k.shape[0], part.local, heads, k.shape[-1] + v.shape[-1])
    for owner in range(part.ranks):
        for _, rows, own, columns in _tiles(owner, setting):
            d_k = d_s[..., rows, columns].mT @ queries[..., rows, :]  # [B, H_kv, G, n, D]
            d_v = p[..., rows, columns].mT @ d_out[..., rows, :]
            gradients[owner, :, own] += torch.cat([d_k, d_v], dim=-1).sum(2).transpose(1, 2)
    received = reduce_scatter(gradients, setting.group).wait()[:, : part.tokens]
    d_k, d_v = split(received, k.shape[-1])
    return _by_token(d_q), d_k, d_v


def _round(x: Tensor, setting: Setting) -> Iterator[tuple[Tile, slice, slice, Tensor]]:
    """K or V `[B, n, H_kv, D]` goes round, the next one on its way meanwhile.

    Gives every tile that this rank sees, the rows and columns of its scores, and its keys or values.
    """
    part, ranks, group = setting.part, setting.part.ranks, setting.group
    for t in range(ranks):
        if t < ranks - 1:
            coming = count(part.all_spans[(part.rank - t - 1) % ranks])
            receive = x.new_empty(x.shape[0], coming, *x.shape[2:])
            transfer = send_receive([(x, (part.rank + 1) % ranks)], [(receive, (part.rank - 1) % ranks)], group)
        here = _by_head(x, x.shape[2])
        for tile, rows, own, columns in _tiles((part.rank - t) % ranks, setting):
            yield tile, rows, columns, here[..., own, :]
        if t < ranks - 1:
            (x,) = transfer.wait()


def _tiles(owner: int, setting: Setting) -> Iterator[tuple[Tile, slice, slice, slice]]:
    """What this rank sees of the owner's tokens: the rows, where they lie among those tokens, and their columns."""
    part = setting.part
    first = owner * part.local  # every rank has C columns
    for tile, row, column in setting.visibility.tiles_of_blocks(part.spans, part.all_spans[owner]):
        rows, own = tile.slices(row, column)
        yield tile, rows, own, slice(own.start + first, own.stop + first)


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, n, H, D]` to `[B, H_kv, G, n, D]` in working precision, G = 1 for keys and values."""
    return x.to(working_dtype(x)).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _by_token(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


_attention = differentiable(forward, backward)


def rsa(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Tensor:
    """See `strategy.py`. An exchange_cache would keep the scores of every layer, so both rings run again instead."""
    return _attention(q, k, v, replace(setting, exchange_cache=None))
