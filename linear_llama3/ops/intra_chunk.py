"""Decays inside a chunk, and the causal scores s_ij = sum_c q_ic k_jc e^{b_ic - b_jc} for j <= i with their backward.

A decay per head scales the plain product. A decay per key channel does not factor out of it: e^{b_i} e^{-b_j} would
overflow. There the triangle is halved again and again: between two halves of a block the product is taken relative to
the edge between them, e^{b_i - b_edge} and e^{b_edge - b_j}, both at most 1, for any decay. Every level is one batched
matrix product. For C = 8, rows are queries, columns keys, and the numbers are levels with halves of that size, `*` is a
query with its own token's key:

    * . . . . . . .
    1 * . . . . . .
    2 2 * . . . . .
    2 2 1 * . . . .
    4 4 4 4 * . . .
    4 4 4 4 1 * . .
    4 4 4 4 2 2 * .
    4 4 4 4 2 2 1 *

q `[..., C * G, D]`, k `[..., C, D]`, b `[..., C, 1 or D]`, scores `[..., C * G, C]`; C a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NOTHING_LEFT = -1e4  # a log decay that multiplies by 0 in any precision; -inf - -inf would be nan


class Decay(NamedTuple):
    """The decays between the tokens of a chunk, all at most 1; a dimension of size 1 stands for equal values."""

    b: Tensor  # [..., C, 1 or D] the log decay cumulated, own token included; see `cumulated_decay`
    from_start: Tensor  # [..., C * G, 1 or D] e^b: of the state before the chunk, on its way to each query
    to_end: Tensor  # [..., C, 1 or D] e^{b_end - b}: of each key, on its way to the state behind the chunk
    total: Tensor  # [..., 1 or D, 1] e^{b_end}: of the state, over the chunk
    pairs: Tensor | None  # [..., C * G, C] e^{b_i - b_j}, 0 where the key comes later; None for a decay per channel


def cumulated_decay(log_decay: Tensor, groups: int, dtype: torch.dtype) -> Decay:
    """`log_decay` `[..., C, 1 or D]` of every token. Its sums are in float64, so that strong decays leave the small
    ones behind them exact, and to base 2: exp2 is several times faster than exp on CPUs."""
    b = (log_decay.double().clamp(min=NOTHING_LEFT) / math.log(2)).cumsum(-2)
    end = b[..., -1:, :]
    pairs = None
    if b.shape[-1] == 1:
        exponents = (b - b.mT).to(dtype).tril_()  # e^{> 0} may be inf
        pairs = _repeat_rows(exponents.exp2_().tril_(), groups)
    return Decay(
        b=b,
        from_start=_repeat_rows(b.to(dtype).exp2(), groups),
        to_end=(end - b).to(dtype).exp2_(),
        total=end.mT.to(dtype).exp2(),
        pairs=pairs,
    )


def _repeat_rows(x: Tensor, groups: int) -> Tensor:
    """One row for each of the G query heads: `[..., C, D]` to `[..., C * G, D]`."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=-2)


def scores(q: Tensor, k: Tensor, decay: Decay) -> Tensor:
    if decay.pairs is None:
        return _channel_scores(q, k, decay.b)
    return (q @ k.mT).mul_(decay.pairs)


def scores_backward(
    q: Tensor, k: Tensor, decay: Decay, s: Tensor, ds: Tensor, *, decay_learns: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q and k, and with `decay_learns` the flow `[..., C, 1 or D]`. Overwrites `s`, the scores, and `ds`.

    The flow of token t is the sum of s_ij ds_ij over i = t, less that over j = t, without the pairs i = j: from t to
    the end of the chunk it adds up to all pairs j < t <= i, those that the decay of t is part of. It is q dq - k dk,
    but there the pairs i = j cancel, and leave a rounding that is large next to strongly decayed pairs.
    """
    if decay.pairs is None:
        return _channel_scores_backward(q, k, decay.b, ds, decay_learns=decay_learns)
    flow = _flow(s.mul_(ds)) if decay_learns else None
    ds = ds.mul_(decay.pairs)
    return ds @ k, ds.mT @ q, flow


def _flow(products: Tensor) -> Tensor:
    _own_token(products).zero_()
    by_query = products.sum(-1).unflatten(-1, (products.shape[-1], -1)).sum(-1)
    return (by_query - products.sum(-2)).unsqueeze(-1)


def _channel_scores(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    s = q.new_zeros(*q.shape[:-1], k.shape[-2])
    _own_token(s).copy_((q.unflatten(-2, (k.shape[-2], -1)) * k.unsqueeze(-2)).sum(-1))
    for half, late, early in _levels(q, k, b):
        _between_halves(s, half).copy_(_second(q, k, half) * late @ (_first(k, half) * early).mT)
    return s


def _channel_scores_backward(
    q: Tensor, k: Tensor, b: Tensor, ds: Tensor, *, decay_learns: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    dq, dk = torch.zeros_like(q), torch.zeros_like(k)
    for half, late, early in _levels(q, k, b):
        part = _between_halves(ds, half)
        _second(dq, k, half).add_(part @ (_first(k, half) * early) * late)
        _first(dk, half).add_(part.mT @ (_second(q, k, half) * late) * early)
    by_token = (-2, (k.shape[-2], -1))  # [..., C, G, D]
    flow = (q * dq).unflatten(*by_token).sum(-2) - k * dk if decay_learns else None
    own = _own_token(ds).unsqueeze(-1)
    dq.unflatten(*by_token).addcmul_(own, k.unsqueeze(-2))
    return dq, dk.add_((own * q.unflatten(*by_token)).sum(-2)), flow


def _levels(q: Tensor, k: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The size of the halves, and their decays relative to the edge: of the later queries and of the earlier keys."""
    half = k.shape[-2] // 2
    while half:
        early = _first(b, half)
        edge = early[..., -1:, :]
        late = _repeat_rows(_second(b, b, half) - edge, q.shape[-2] // k.shape[-2])
        yield half, late.to(q.dtype).exp2_(), (edge - early).to(q.dtype).exp2_()
        half //= 2


def _first(k: Tensor, half: int) -> Tensor:
    """The first half of every pair of halves: `[..., C, D]` to `[..., C / 2 half, half, D]`."""
    return k.unflatten(-2, (-1, 2, half))[..., 0, :, :]


def _second(q: Tensor, k: Tensor, half: int) -> Tensor:
    return q.unflatten(-2, (-1, 2, half * (q.shape[-2] // k.shape[-2])))[..., 1, :, :]


def _between_halves(s: Tensor, half: int) -> Tensor:
    """View `[..., C / 2 half, half * G, half]` of the scores of second-half queries with first-half keys: all squares
    of one level in the drawing above."""
    groups = s.shape[-2] // s.shape[-1]
    blocks = s.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half * groups))  # [..., m, 2, half * G, m, 2, half]
    below = blocks[..., 1, :, :, 0, :]  # [..., m, half * G, m, half]: second halves with first halves of all blocks
    return below.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # of the same block


def _own_token(s: Tensor) -> Tensor:
    """View `[..., C, G]` of the scores of every query with its own token's key."""
    return s.unflatten(-2, (s.shape[-1], -1)).diagonal(dim1=-3, dim2=-1).mT
