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
        (q0, q1), (k0, k1) = queries, keys
        for n in range(self._document(max(q0, k0)), len(self.documents) - 1):
            start, stop = self.documents[n : n + 2]
            if start >= min(q1, k1):
                return
            yield from self._in_document(max(q0, start), min(q1, stop), max(k0, start), min(k1, stop))

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
        return next(self.tiles(queries, keys), None) is not None

    def first_key(self, query: int) -> int:
        """The earliest key that `query` sees."""
        start = self.documents[self._document(query)]
        return start if self.window is None else max(start, query - self.window + 1)

    def last_key(self, query: int) -> int:
        """The latest key that `query` sees."""
        return query if self.causal else self.documents[self._document(query) + 1] - 1

    def _document(self, position: int) -> int:
        return bisect_right(self.documents, position) - 1

    def _in_document(self, q0: int, q1: int, k0: int, k1: int) -> Iterator[Tile]:
        if self.causal:
            q0 = max(q0, k0)  # earlier queries see none of the keys,
            if self.window is not None:
                q1 = min(q1, k1 - 1 + self.window)  # and neither do those behind the window of the last key
        if q0 >= q1 or k0 >= k1:
            return
        if self.window is not None:
            for a in range(q0, q1, WINDOW_TILE):
                b = min(a + WINDOW_TILE, q1)
                first = max(k0, a - self.window + 1)
                yield Tile(q_start=a, q_stop=b, k_start=first, k_stop=min(k1, b), window=self.window)
            return
        edge = q0 if self.causal else k1  # all queries see the keys before it
        if k0 < edge:
            yield Tile(q_start=q0, q_stop=q1, k_start=k0, k_stop=min(k1, edge))
        if edge < k1:
            end = min(q1, k1)
            yield Tile(q_start=q0, q_stop=end, k_start=q0, k_stop=end, causal=True)
            if end < q1:
                yield Tile(q_start=end, q_stop=q1, k_start=q0, k_stop=end)


def _with_shift(spans: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Every span with what its global positions have to be shifted by to become rows of the block."""
    row = 0
    for start, stop in spans:
        yield row - start, (start, stop)
        row += stop - start
