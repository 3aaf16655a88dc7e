"""Routes round the ring of ranks: blocks travel only as far as a rank ahead has a use for them.

At step t a rank holds the block of the rank t places up or down the ring, its source. A block is made of its source's
chunks, and each travels to the last rank on its way that sees it (keys), or where it sees something (queries). What is
published for one mask each follows from this rule: contiguous causal blocks stop at the end of the ring, zigzag blocks
lose one half on the way (0.75 of all rows are sent, the half-Q saving of arXiv 2412.20501), a window ends the ring
after a few hops, and so do the edges of packed documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from ...ops.visibility import Span, Visibility
from ..sequence_shard import SequenceShard, count

ChunkIds = tuple[int, ...]  # places of chunks in their source's block, ascending


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The place of every chunk at every step."""

    direction: int  # +1: from rank r to r + 1; -1: to r - 1
    all_spans: tuple[tuple[Span, ...], ...]  # by source rank
    used: tuple[
        tuple[frozenset[int], ...], ...
    ]  # by source rank and place: the steps at which a rank has a use for the chunk

    @property
    def ranks(self) -> int:
        return len(self.all_spans)

    @property
    def steps(self) -> int:
        """One more than the hops of the chunk that travels farthest."""
        return 1 + max(max(steps, default=0) for owner in self.used for steps in owner)

    def source_rank(self, rank: int, step: int) -> int:
        """The rank whose block `rank` holds."""
        return (rank - self.direction * step) % self.ranks

    def holder(self, rank: int, step: int) -> int:
        """The rank that holds the block of `rank`."""
        return (rank + self.direction * step) % self.ranks

    def held(self, rank: int, step: int) -> ChunkIds:
        """The chunks that `rank` holds: of the block of `source_rank(rank, step)`, those used then or later."""
        used = self.used[self.source_rank(rank, step)]
        return tuple(i for i, steps in enumerate(used) if step == 0 or max(steps, default=0) >= step)

    def visible(self, rank: int, step: int) -> ChunkIds:
        """The chunks held that `rank` itself has a use for."""
        used = self.used[self.source_rank(rank, step)]
        return tuple(i for i in self.held(rank, step) if step in used[i])

    def forwarded(self, rank: int, step: int) -> ChunkIds:
        """The chunks held that travel on after this step."""
        return self.held(self.holder(rank, 1), step + 1)

    def finished(self, rank: int, step: int) -> ChunkIds:
        """The chunks held that travel no further."""
        forwarded = self.forwarded(rank, step)
        return tuple(i for i in self.held(rank, step) if i not in forwarded)

    def spans(self, rank: int, step: int, chunks: ChunkIds) -> tuple[Span, ...]:
        spans = self.all_spans[self.source_rank(rank, step)]
        return tuple(spans[i] for i in chunks)

    def rows(self, rank: int, step: int, given: ChunkIds, wanted: ChunkIds) -> list[slice]:
        """The rows of the chunks `wanted` in a block that has the chunks `given`."""
        found, start = [], 0
        for place, (a, b) in zip(given, self.spans(rank, step, given), strict=True):
            if place in wanted:
                found.append(slice(start, start + b - a))
            start += b - a
        return found

    def select(self, x: Tensor, rank: int, step: int, wanted: ChunkIds) -> Tensor:
        """Select the chunks `wanted` of the block `[B, n, ...]` that `rank` holds."""
        given = self.held(rank, step)
        if wanted == given:
            return x
        return torch.cat([x[:, :0], *(x[:, where] for where in self.rows(rank, step, given, wanted))], dim=1)

    def returned(self, x: Tensor, rank: int, chunks: ChunkIds) -> Iterator[tuple[slice, Tensor]]:
        """Pair the rows of these chunks in the block of `rank` with their rows of `x` `[B, n, ...]`, made of them."""
        where = self.rows(rank, 0, self.held(rank, 0), chunks)
        return zip(where, x.split([rows.stop - rows.start for rows in where], dim=1), strict=True)

    def empty(self, like: Tensor, rank: int, step: int, chunks: ChunkIds) -> Tensor:
        """Room for these chunks of the block of `source_rank(rank, step)`, shaped like `like` `[B, *, ...]`."""
        return like.new_empty(like.shape[0], count(self.spans(rank, step, chunks)), *like.shape[2:])


def route_of_keys(shard: SequenceShard, visibility: Visibility) -> Route:
    """Keys go to the ranks whose queries see them."""
    return _shortest(shard.all_spans, visibility, queries_travel=False)


def route_of_queries(shard: SequenceShard, visibility: Visibility) -> Route:
    """Queries go to the ranks whose keys they see."""
    return _shortest(shard.all_spans, visibility, queries_travel=True)


@lru_cache(maxsize=64)  # all layers of a batch use the same route
def _shortest(all_spans: tuple[tuple[Span, ...], ...], visibility: Visibility, *, queries_travel: bool) -> Route:
    """The direction round the ring in which fewer tokens are sent."""
    ranks = len(all_spans)

    def useful(span: Span, others: Sequence[Span]) -> bool:
        if queries_travel:
            return any(visibility.sees(span, other) for other in others)
        return any(visibility.sees(other, span) for other in others)

    def route(direction: int) -> Route:
        used = tuple(
            tuple(
                frozenset(t for t in range(ranks) if useful(span, all_spans[(owner + direction * t) % ranks]))
                for span in spans
            )
            for owner, spans in enumerate(all_spans)
        )
        return Route(direction=direction, all_spans=all_spans, used=used)

    def tokens_sent(route: Route) -> int:
        spans, used = (list(chain.from_iterable(x)) for x in (all_spans, route.used))
        return sum((b - a) * max(steps, default=0) for (a, b), steps in zip(spans, used, strict=True))

    return min(route(-1), route(1), key=tokens_sent)
