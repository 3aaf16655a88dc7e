"""The keys that a query sees, as a rule on positions and never a matrix of T x T.

Blocks of queries and keys are intervals of one global sequence. The rule cuts a pair of intervals into tiles that
are fully visible, causal squares, or, with a window, narrow bands; a pair that sees nothing gives no tile and costs
nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Span = tuple[int, int]  # global positions [start, stop)

WINDOW_TILE = 256  # query rows of a band tile: a few wasted keys against more kernel calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Queries [q_start, q_stop) with keys [k_start, k_stop), global positions."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool = False  # a square on the diagonal
    window: int | None = None  # a band: keys at most window - 1 before the query

    def slices(self, row: int, column: int) -> tuple[slice, slice]:
        """The slices of its queries and keys, shifted by these offsets."""
        return slice(self.q_start + row, self.q_stop + row), slice(self.k_start + column, self.k_stop + column)

    def split(self, rows: int) -> Iterator[Tile]:
        """Split into tiles of at most `rows` queries."""
        for a in range(self.q_start, self.q_stop, rows):
            b = min(a + rows, self.q_stop)
            if not self.causal:
                yield replace(self, q_start=a, q_stop=b)
                continue
            if self.k_start < a:
                yield Tile(q_start=a, q_stop=b, k_start=self.k_start, k_stop=a)
            yield Tile(q_start=a, q_stop=b, k_start=a, k_stop=b, causal=True)

    def hidden(self, device: torch.device) -> Tensor | None:
        """True `[T_q, T_k]` where a band's key is not visible; None where the complete tile is."""
        if self.window is None:
            return None
        if self.k_stop - 1 <= self.q_start and self.q_stop - 1 - self.k_start < self.window:
            return None  # the last key is not later than the first query, the first key not too far from the last
        queries = torch.arange(self.q_start, self.q_stop, device=device)
        distance = queries.unsqueeze(1) - torch.arange(self.k_start, self.k_stop, device=device)
        return (distance < 0) | (distance >= self.window)

    def mask(self, scores: Tensor) -> Tensor:
        """Scores `[..., T_q, T_k]`, -inf where the key is not visible."""
        hidden = self.hidden(scores.device)
        if self.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Visibility:
    """A query sees the keys of its document, not later ones (causal), the last `window` of them."""

    documents: tuple[int, ...]  # edges (0, ..., length)
    causal: bool = True
    window: int | None = None

    def tiles(self, queries: Span, keys: Span) -> Iterator[Tile]:
        first = max(min(queries[0], keys[0]), 0)
        for n in range(max(bisect_right(self.documents, first) - 1, 0), len(self.documents) - 1):
            start, stop = self.documents[n : n + 2]
            q0, q1 = max(start, queries[0]), min(stop, queries[1])
            k0, k1 = max(start, keys[0]), min(stop, keys[1])
            if start >= queries[1] or start >= keys[1]:
                return
            if q0 >= q1 or k0 >= k1:
                continue
            if not self.causal:
                yield Tile(q_start=q0, q_stop=q1, k_start=k0, k_stop=k1)
            elif self.window is not None:
                yield from self._bands(q0, q1, k0, k1, self.window)
            else:
                yield from self._causal(q0, q1, k0, k1)

    def tiles_of_blocks(self, queries: Sequence[Span], keys: Sequence[Span]) -> Iterator[tuple[Tile, int, int]]:
        """The tiles of two blocks, each of the tokens of some spans, one span after another.

        With a tile comes what its positions have to be shifted by to become rows and columns of the blocks.
        """
        for row, query_span in _with_shift(queries):
            for column, key_span in _with_shift(keys):
                for tile in self.tiles(query_span, key_span):
                    yield tile, row, column

    def sees(self, queries: Span, keys: Span) -> bool:
        """True if any of these queries sees any of these keys."""
        (q0, q1), (k0, k1) = queries, keys
        if q0 >= q1 or k0 >= k1:
            return False
        if q1 <= k0:  # all keys are later: the nearest pair is (q1 - 1, k0)
            return not self.causal and self._document(q1 - 1) == self._document(k0)
        if k1 <= q0:
            near = self.window is None or q0 - (k1 - 1) < self.window
            return near and self._document(q0) == self._document(k1 - 1)
        return True  # a token sees itself

    def first_key(self, query: int) -> int:
        """The earliest key that `query` sees."""
        start = self.documents[self._document(query)]
        return start if self.window is None else max(start, query - self.window + 1)

    def last_key(self, query: int) -> int:
        """The latest key that `query` sees."""
        return query if self.causal else self.documents[self._document(query) + 1] - 1

    def _document(self, position: int) -> int:
        return bisect_right(self.documents, position) - 1

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


def _with_shift(spans: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Every span with what its global positions have to be shifted by to become rows of the block."""
    row = 0
    for start, stop in spans:
        yield row - start, (start, stop)
        row += stop - start
