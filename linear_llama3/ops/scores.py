"""Decayed causal scores inside a chunk, s_ij = sum_c q_ic k_jc e^{b_ic - b_jc} for j <= i, and their backward.

A decay per head scales the plain product. A decay per key channel does not factor out of it: e^{b_i} e^{-b_j} would
overflow. There the triangle is halved again and again (64 = 32 + 32, 32 = 16 + 16, ...): between two halves the
product is taken relative to the edge between them, e^{b_i - b_edge} and e^{b_edge - b_j}, both at most 1, for any
decay. Every level is one batched matrix product.

q `[..., C * G, D]`, k `[..., C, D]`, b `[..., C, 1 or D]` or None, scores `[..., C * G, C]`; C a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def repeat_rows(b: Tensor, q: Tensor) -> Tensor:
    """One row of `b` for every row of `q`: `[..., C, D]` to `[..., C * G, D]`."""
    groups = q.shape[-2] // b.shape[-2]
    return b if groups == 1 else b.repeat_interleave(groups, dim=-2)


def scores(q: Tensor, k: Tensor, b: Tensor | None) -> Tensor:
    if b is not None and b.shape[-1] > 1:
        return _channel_scores(q, k, b)
    s = q @ k.mT
    if b is None:
        return s.masked_fill_(_future(q, k), 0)
    return s.mul_(_pair_decay(q, k, b))


def scores_backward(q: Tensor, k: Tensor, b: Tensor | None, ds: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of q and k; the one of b follows from them (q * dq - k * dk). `ds` may be overwritten."""
    if b is not None and b.shape[-1] > 1:
        return _channel_scores_backward(q, k, b, ds)
    ds = ds.masked_fill_(_future(q, k), 0) if b is None else ds.mul_(_pair_decay(q, k, b))
    return ds @ k, ds.mT @ q


def _future(q: Tensor, k: Tensor) -> Tensor:
    """True `[C * G, C]` where the key comes after the query."""
    groups = q.shape[-2] // k.shape[-2]
    query = torch.arange(q.shape[-2], device=q.device) // groups
    return query.unsqueeze(1) < torch.arange(k.shape[-2], device=k.device)


def _pair_decay(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    exponent = (repeat_rows(b, q) - b.mT).to(q.dtype)
    return exponent.masked_fill_(_future(q, k), -torch.inf).exp_()  # masked first: e^{> 0} may be inf


def _channel_scores(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    s = q.new_zeros(*q.shape[:-1], k.shape[-2])
    _own_token(s).copy_((q.unflatten(-2, (k.shape[-2], -1)) * k.unsqueeze(-2)).sum(-1))
    for half in _halves(k):
        late, early = _relative_to_edge(q, k, b, half)
        _between_halves(s, half).copy_(_second(q, k, half) * late @ (_first(k, half) * early).mT)
    return s


def _channel_scores_backward(q: Tensor, k: Tensor, b: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
    own = _own_token(ds).unsqueeze(-1)  # [..., C, G, 1]
    dq = (own * k.unsqueeze(-2)).flatten(-3, -2)
    dk = (own * q.unflatten(-2, (k.shape[-2], -1))).sum(-2)
    for half in _halves(k):
        late, early = _relative_to_edge(q, k, b, half)
        part = _between_halves(ds, half)
        _second(dq, k, half).add_(part @ (_first(k, half) * early) * late)
        _first(dk, half).add_(part.mT @ (_second(q, k, half) * late) * early)
    return dq, dk


def _halves(k: Tensor) -> Iterator[int]:
    half = k.shape[-2] // 2
    while half:
        yield half
        half //= 2


def _first(k: Tensor, half: int) -> Tensor:
    """The first half of every pair of halves: `[..., C, D]` to `[..., C / 2 half, half, D]`."""
    return k.unflatten(-2, (-1, 2, half))[..., 0, :, :]


def _second(q: Tensor, k: Tensor, half: int) -> Tensor:
    return q.unflatten(-2, (-1, 2, half * (q.shape[-2] // k.shape[-2])))[..., 1, :, :]


def _relative_to_edge(q: Tensor, k: Tensor, b: Tensor, half: int) -> tuple[Tensor, Tensor]:
    early = _first(b, half)
    edge = early[..., -1:, :]
    late = _second(repeat_rows(b, q), k, half) - edge
    return late.to(q.dtype).exp_(), (edge - early).to(q.dtype).exp_()


def _between_halves(s: Tensor, half: int) -> Tensor:
    """View `[..., C / 2 half, half * G, half]` of the scores of second-half queries with first-half keys."""
    groups = s.shape[-2] // s.shape[-1]
    tiles = s.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half * groups))  # [..., m, 2, hG, m, 2, h]
    return tiles[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _own_token(s: Tensor) -> Tensor:
    """View `[..., C, G]` of the scores of every query with its own token's key."""
    return s.unflatten(-2, (s.shape[-1], -1)).diagonal(dim1=-3, dim2=-1).mT
