"""Softmax attention of a block of queries with a block of keys: (out, lse), and the backward from a global lse.

Blocks are intervals of one global sequence, so a mask is a rule on positions (`Visibility`) and never a matrix of
T x T. The rule cuts a pair of blocks into tiles that are fully visible, causal squares, or, with a window, narrow
bands; pairs that see nothing give no tile and cost nothing. Partial results merge by their log-sum-exp
(arXiv 2310.01889, section 3, in its overflow-safe form).

q `[B, T_q, H_q, D]`, k `[B, T_k, H_kv, D]`, v `[B, T_k, H_kv, D_v]`; out in float32 (float64 for float64 inputs),
lse `[B, H_q, T_q]`, -inf where a query has seen no key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

WINDOW_TILE = 256  # query rows of a band tile: a few wasted keys against more kernel calls
SCORE_ROWS = 256  # query rows at once where the scores are formed, T_q x T_k, for want of a fused operator


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Queries [q_start, q_stop) with keys [k_start, k_stop), global positions."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool = False  # a square on the diagonal
    window: int | None = None  # a band: keys at most window - 1 before the query

    def split(self, rows: int) -> Iterator[Tile]:
        """The same in tiles of at most `rows` queries."""
        for a in range(self.q_start, self.q_stop, rows):
            b = min(a + rows, self.q_stop)
            if not self.causal:
                yield replace(self, q_start=a, q_stop=b)
                continue
            if self.k_start < a:
                yield Tile(q_start=a, q_stop=b, k_start=self.k_start, k_stop=a)
            yield Tile(q_start=a, q_stop=b, k_start=a, k_stop=b, causal=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Visibility:
    """Which keys a query sees: those of its document, not later ones (causal), the last `window` of them."""

    documents: tuple[int, ...]  # edges (0, ..., length)
    causal: bool = True
    window: int | None = None

    def tiles(self, queries: tuple[int, int], keys: tuple[int, int]) -> Iterator[Tile]:
        for start, stop in zip(self.documents, self.documents[1:], strict=False):
            q0, q1 = max(start, queries[0]), min(stop, queries[1])
            k0, k1 = max(start, keys[0]), min(stop, keys[1])
            if q0 >= q1 or k0 >= k1:
                continue
            if not self.causal:
                yield Tile(q_start=q0, q_stop=q1, k_start=k0, k_stop=k1)
            elif self.window is not None:
                yield from self._bands(q0, q1, k0, k1, self.window)
            else:
                yield from self._causal(q0, q1, k0, k1)

    def first_key(self, query: int) -> int:
        """The earliest key that `query` sees."""
        start = max(edge for edge in self.documents if edge <= query)
        return start if self.window is None else max(start, query - self.window + 1)

    @staticmethod
    def _causal(q0: int, q1: int, k0: int, k1: int) -> Iterator[Tile]:
        if k0 < q0:  # keys before all queries
            yield Tile(q_start=q0, q_stop=q1, k_start=k0, k_stop=min(k1, q0))
        a, b = max(q0, k0), min(q1, k1)
        if a < b:
            yield Tile(q_start=a, q_stop=b, k_start=a, k_stop=b, causal=True)
            if b < q1:  # queries after all keys
                yield Tile(q_start=b, q_stop=q1, k_start=a, k_stop=b)

    @staticmethod
    def _bands(q0: int, q1: int, k0: int, k1: int, window: int) -> Iterator[Tile]:
        for a in range(q0, q1, WINDOW_TILE):
            b = min(a + WINDOW_TILE, q1)
            first, last = max(k0, a - window + 1), min(k1, b)
            if first < last:
                yield Tile(q_start=a, q_stop=b, k_start=first, k_stop=last, window=window)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, visibility: Visibility) -> Tensor:
    """Attention of whole sequences on one device; out `[B, T, H_q, D_v]` in the working precision."""
    return _SoftmaxAttention.apply(q, k, v, scale, visibility)


class _SoftmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, visibility: Visibility) -> Tensor:
        block = BlockAttention(q, 0, value_dim=v.shape[-1], scale=scale, visibility=visibility)
        block.add(k, v, 0)
        out, lse = block.result()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.visibility = scale, visibility
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        block = BlockAttentionBackward(q, 0, out, lse, d_out, scale=ctx.scale, visibility=ctx.visibility)
        d_k, d_v = out.new_zeros(k.shape), out.new_zeros(v.shape)
        block.add(k, v, 0, d_k, d_v)
        return block.result().to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None


class BlockAttention:
    """Accumulates out and lse of one block of queries over any number of blocks of keys."""

    def __init__(self, q: Tensor, start: int, *, value_dim: int, scale: float, visibility: Visibility) -> None:
        self.start, self.scale, self.visibility = start, scale, visibility
        self.work = torch.promote_types(q.dtype, torch.float32)
        self.q = q.to(self.work).transpose(1, 2)  # [B, H_q, T_q, D]
        self.out = self.q.new_zeros(*self.q.shape[:3], value_dim)
        self.lse = self.q.new_full(self.q.shape[:3], -torch.inf)

    def add(self, k: Tensor, v: Tensor, start: int) -> None:
        """Keys and values at global positions [start, start + T_k)."""
        k, v = k.to(self.work).transpose(1, 2), v.to(self.work).transpose(1, 2)
        for tile in _tiles(self, k, v, start):
            rows = slice(tile.q_start - self.start, tile.q_stop - self.start)
            columns = slice(tile.k_start - start, tile.k_stop - start)
            out, lse = _attend(self.q[:, :, rows], k[:, :, columns], v[:, :, columns], tile, self.scale)
            _merge(self.out[:, :, rows], self.lse[:, :, rows], out, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """out `[B, T_q, H_q, D_v]` and lse `[B, H_q, T_q]`."""
        return self.out.transpose(1, 2), self.lse


class BlockAttentionBackward:
    """The gradients of the block, from the global out and lse: pairs of blocks are independent, plain sums."""

    def __init__(
        self,
        q: Tensor,
        start: int,
        out: Tensor,
        lse: Tensor,
        d_out: Tensor,
        *,
        scale: float,
        visibility: Visibility,
    ) -> None:
        self.start, self.scale, self.visibility = start, scale, visibility
        self.work = torch.promote_types(q.dtype, torch.float32)
        self.q, self.out, self.d_out = (x.to(self.work).transpose(1, 2) for x in (q, out, d_out))
        self.lse = lse
        self.d_q = torch.zeros_like(self.q)

    def add(self, k: Tensor, v: Tensor, start: int, d_k: Tensor, d_v: Tensor) -> None:
        """Adds to the gradients of these keys and values, `d_k` and `d_v` shaped like them, in working precision."""
        k, v, d_k, d_v = (x.to(self.work).transpose(1, 2) for x in (k, v, d_k, d_v))
        for tile in _tiles(self, k, v, start):
            rows = slice(tile.q_start - self.start, tile.q_stop - self.start)
            columns = slice(tile.k_start - start, tile.k_stop - start)
            q, out, lse, d_out = (x[:, :, rows] for x in (self.q, self.out, self.lse, self.d_out))
            d_query, d_key, d_value = _attend_backward(
                q, out, lse, d_out, k[:, :, columns], v[:, :, columns], tile, self.scale
            )
            self.d_q[:, :, rows] += d_query
            d_k[:, :, columns] += d_key
            d_v[:, :, columns] += d_value

    def result(self) -> Tensor:
        """The gradient of the queries `[B, T_q, H_q, D]`."""
        return self.d_q.transpose(1, 2)


def _tiles(block: BlockAttention | BlockAttentionBackward, k: Tensor, v: Tensor, start: int) -> Iterator[Tile]:
    """Tiles of the block with keys at [start, start + T_k), small enough for the operator at hand."""
    queries, keys = (block.start, block.start + block.q.shape[2]), (start, start + k.shape[2])
    for tile in block.visibility.tiles(queries, keys):
        if _fused(block.q, v):
            yield tile
        else:
            yield from tile.split(SCORE_ROWS)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Adds the attention over further keys, in place."""
    total = torch.logaddexp(lse, other_lse)
    shift = total.masked_fill(total == -torch.inf, 0)  # no key seen so far: weights 0, not nan
    out.mul_((lse - shift).exp_().unsqueeze(-1)).add_(other * (other_lse - shift).exp_().unsqueeze(-1))
    lse.copy_(total)


def _fused(q: Tensor, v: Tensor) -> bool:
    """Whether torch's CPU flash operator serves: it refuses D_v != D."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def _attend(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
    hidden = _hidden(tile, q.device)
    if _fused(q, v):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, tile.causal, attn_mask=_bias(hidden, q.dtype), scale=scale
        )
        if hidden is not None:  # the operator reports lse 0 for a row without a visible key
            lse = lse.masked_fill(hidden.all(-1), -torch.inf)
        return out, lse
    s = _scores(q, k, tile, hidden, scale)
    lse = s.logsumexp(-1)
    p = (s - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    return _group_rows(p @ v.unsqueeze(2)), _group_rows(lse)


def _attend_backward(
    q: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = _hidden(tile, q.device)
    if hidden is not None:  # rows that see no key here contribute nothing; inf keeps exp(s - lse) at 0
        lse = lse.masked_fill(hidden.all(-1), torch.inf) if not _fused(q, v) else lse
    if _fused(q, v):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, tile.causal, attn_mask=_bias(hidden, q.dtype), scale=scale
        )
    delta = (d_out * out).sum(-1)
    heads = k.shape[1]
    q_g, d_out_g, lse_g, delta_g = (x.unflatten(1, (heads, -1)) for x in (q, d_out, lse, delta))
    p = (_scores(q, k, tile, hidden, scale) - lse_g.unsqueeze(-1)).exp()
    d_s = scale * p * (d_out_g @ v.unsqueeze(2).mT - delta_g.unsqueeze(-1))
    return _group_rows(d_s @ k.unsqueeze(2)), (d_s.mT @ q_g).sum(2), (p.mT @ d_out_g).sum(2)


def _scores(q: Tensor, k: Tensor, tile: Tile, hidden: Tensor | None, scale: float) -> Tensor:
    """`[B, H_kv, G, T_q, T_k]`"""
    s = scale * (q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).mT)
    if tile.causal:
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    return s if hidden is None else s.masked_fill(hidden, -torch.inf)


def _group_rows(x: Tensor) -> Tensor:
    """`[B, H_kv, G, ...]` to `[B, H_q, ...]`."""
    return x.flatten(1, 2)


def _hidden(tile: Tile, device: torch.device) -> Tensor | None:
    """True `[T_q, T_k]` where a band tile's key is not visible; None where the whole tile is."""
    if tile.window is None:
        return None
    distance = torch.arange(tile.q_start, tile.q_stop, device=device).unsqueeze(1) - torch.arange(
        tile.k_start, tile.k_stop, device=device
    )
    hidden = (distance < 0) | (distance >= tile.window)
    return hidden if bool(hidden.any()) else None


def _bias(hidden: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The operator wants a float mask."""
    return None if hidden is None else torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
