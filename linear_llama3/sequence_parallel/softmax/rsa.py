"""Ring Self-Attention (RSA, arXiv 2105.13120): the exact scores of a rank's queries with all keys, in two rings.

K goes round the ring and fills the rows of scores column by column; after an ordinary softmax over complete rows,
V goes round. In the backward pass V goes round for the gradient of the weights and K for that of the queries; the
gradients of K and V are summed by one reduce-scatter. The scores take B * H_q * C * T numbers: a baseline of the
literature, not a way to long sequences.

Every product is taken over visible tiles only, not over complete rows: a weight of 0 would carry nan and inf from one
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
from ..sequence_shard import count
from .strategy import AttentionSpec, Gradients, Residuals, differentiable, split


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Residuals]:
    shard = spec.shard
    queries = _by_head(q, k.shape[2])  # [B, H_kv, G, n, D]
    scores = queries.new_full((*queries.shape[:4], shard.ranks * shard.local), -torch.inf)
    for tile, rows, columns, keys in _round(k, spec):
        scores[..., rows, columns] = tile.mask(spec.scale * (queries[..., rows, :] @ keys.mT))
    p = scores.softmax(-1)
    out = queries.new_zeros(*queries.shape[:4], v.shape[-1])
    for _, rows, columns, values in _round(v, spec):
        out[..., rows, :] += p[..., rows, columns] @ values
    return _by_token(out), (p,)


def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, residuals: Residuals, spec: AttentionSpec) -> Gradients:
    (p,), shard, heads = residuals, spec.shard, k.shape[2]
    queries, d_out = _by_head(q, heads), _by_head(d_out, heads)
    d_p = torch.zeros_like(p)
    for _, rows, columns, values in _round(v, spec):
        d_p[..., rows, columns] = d_out[..., rows, :] @ values.mT
    d_s = spec.scale * p * (d_p - (d_p * p).sum(-1, keepdim=True))
    d_q = torch.zeros_like(queries)
    for _, rows, columns, keys in _round(k, spec):
        d_q[..., rows, :] += d_s[..., rows, columns] @ keys

    gradients = p.new_zeros(shard.ranks, k.shape[0], shard.local, heads, k.shape[-1] + v.shape[-1])
    for owner in range(shard.ranks):
        for _, rows, own, columns in _tiles(owner, spec):
            d_k = d_s[..., rows, columns].mT @ queries[..., rows, :]  # [B, H_kv, G, n, D]
            d_v = p[..., rows, columns].mT @ d_out[..., rows, :]
            gradients[owner, :, own] += torch.cat([d_k, d_v], dim=-1).sum(2).transpose(1, 2)
    received = reduce_scatter(gradients, spec.group).wait()[:, : shard.tokens]
    d_k, d_v = split(received, k.shape[-1])
    return _by_token(d_q), d_k, d_v


def _round(x: Tensor, spec: AttentionSpec) -> Iterator[tuple[Tile, slice, slice, Tensor]]:
    """K or V `[B, n, H_kv, D]` goes round, the next one on its way meanwhile.

    Gives every tile that this rank sees, the rows and columns of its scores, and its keys or values.
    """
    shard, ranks, group = spec.shard, spec.shard.ranks, spec.group
    for t in range(ranks):
        if t < ranks - 1:
            coming = count(shard.all_spans[(shard.rank - t - 1) % ranks])
            receive = x.new_empty(x.shape[0], coming, *x.shape[2:])
            transfer = send_receive([(x, (shard.rank + 1) % ranks)], [(receive, (shard.rank - 1) % ranks)], group)
        here = _by_head(x, x.shape[2])
        for tile, rows, own, columns in _tiles((shard.rank - t) % ranks, spec):
            yield tile, rows, columns, here[..., own, :]
        if t < ranks - 1:
            (x,) = transfer.wait()


def _tiles(owner: int, spec: AttentionSpec) -> Iterator[tuple[Tile, slice, slice, slice]]:
    """The tiles of a rank's tokens that this rank sees: rows, places among those tokens, and columns of the scores."""
    shard = spec.shard
    first = owner * shard.local  # every rank has C columns
    for tile, row, column in spec.visibility.tiles_of_blocks(shard.spans, shard.all_spans[owner]):
        rows, own = tile.slices(row, column)
        yield tile, rows, own, slice(own.start + first, own.stop + first)


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, n, H, D]` to `[B, H_kv, G, n, D]` in working precision, G = 1 for keys and values."""
    return x.to(working_dtype(x)).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _by_token(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


_attention = differentiable(forward, backward)


def rsa(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """See `strategy.py`. An exchange_cache would keep the scores of every layer, so both rings run again instead."""
    return _attention(q, k, v, replace(spec, exchange_cache=None))
