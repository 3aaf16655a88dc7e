"""Routes round the ring of ranks: blocks travel only as far as a rank ahead has a use for them.

At step t a rank holds the block of the rank t places up or down the ring, its source. A block is made of its source's
chunks, and each travels to the last rank on its way that sees it (keys), or where it sees something (queries). What is
published for one mask each follows from this rule: contiguous causal blocks stop at the end of the ring, zigzag blocks
lose one half on the way (0.75 of all rows are sent, the half-Q saving of arXiv 2412.20501), a window ends the ring
after a few hops, and so do the edges of packed documents.

A route is a table: for every step, what a rank computes, sends and receives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from ...ops.visibility import Span, Visibility
from ..sequence_shard import SequenceShard, count

Uses = frozenset[int]  # the steps at which a rank has a use for a chunk


@dataclass(frozen=True, slots=True)
class Part:
    """Some chunks of a block `[B, n, ...]`."""

    rows: tuple[slice, ...]  # in the block
    spans: tuple[Span, ...]  # global positions

    def of(self, block: Tensor) -> Tensor:
        """Select this part; the block itself if that is all of it."""
        if count(self.spans) == block.shape[1]:
            return block
        return torch.cat([block[:, :0], *(block[:, rows] for rows in self.rows)], dim=1)

    def empty(self, like: Tensor) -> Tensor:
        """Allocate this part, with the other dims and the dtype of `like`."""
        return like.new_empty(like.shape[0], count(self.spans), *like.shape[2:])

    def split(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Pair the rows in the block with those of `x`, which holds this part alone."""
        return zip(self.rows, x.split([rows.stop - rows.start for rows in self.rows], dim=1), strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of one rank. It holds the block of `source`, and `holder` holds its own."""

    next_rank: int
    previous_rank: int
    source: int
    holder: int
    held: Part  # the complete block held
    visible: Part  # of the block held: what this rank has a use for
    forwarded: Part  # of the block held: what travels on to the next rank
    finished: Part  # of the block held: what travels no further
    arriving: Part  # the block of the next step, from the previous rank
    visible_to_holder: Part  # of this rank's own block, as long as another rank holds it
    finished_by_holder: Part  # the same


def route_of_keys(shard: SequenceShard, visibility: Visibility) -> tuple[Step, ...]:
    """Keys go to the ranks whose queries see them. After the last step, one more in which nothing is held."""
    return _route(shard.rank, shard.all_spans, visibility, queries_travel=False)


def route_of_queries(shard: SequenceShard, visibility: Visibility) -> tuple[Step, ...]:
    """Queries go to the ranks whose keys they see. After the last step, one more in which nothing is held."""
    return _route(shard.rank, shard.all_spans, visibility, queries_travel=True)


@lru_cache(maxsize=64)  # all layers of a batch use the same route
def _route(
    rank: int, all_spans: tuple[tuple[Span, ...], ...], visibility: Visibility, *, queries_travel: bool
) -> tuple[Step, ...]:
    """Plan the way round the ring in the direction in which fewer tokens are sent."""
    ranks = len(all_spans)

    def useful(span: Span, others: tuple[Span, ...]) -> bool:
        return any(visibility.sees(*((span, other) if queries_travel else (other, span))) for other in others)

    def uses(direction: int) -> list[list[Uses]]:  # by source and place in its block
        return [
            [
                frozenset(t for t in range(ranks) if useful(span, all_spans[(source + direction * t) % ranks]))
                for span in spans
            ]
            for source, spans in enumerate(all_spans)
        ]

    def last(steps: Uses) -> int:
        return max(steps, default=0)

    def tokens_sent(used: list[list[Uses]]) -> int:
        chunks = zip(chain.from_iterable(all_spans), chain.from_iterable(used), strict=True)
        return sum((b - a) * last(steps) for (a, b), steps in chunks)

    both = {direction: uses(direction) for direction in (-1, 1)}
    direction = min(both, key=lambda direction: tokens_sent(both[direction]))
    used = both[direction]

    def part(source: int, t: int, wanted: Callable[[Uses], bool]) -> Part:
        """The chunks wanted, and their rows in the block of `source` as it is at step t."""
        rows, spans, start = [], [], 0
        for (a, b), steps in zip(all_spans[source], used[source], strict=True):
            if last(steps) < t:  # left behind
                continue
            if wanted(steps):
                rows.append(slice(start, start + b - a))
                spans.append((a, b))
            start += b - a
        return Part(tuple(rows), tuple(spans))

    def step(t: int) -> Step:
        source, upcoming = (rank - direction * t) % ranks, (rank - direction * (t + 1)) % ranks
        return Step(
            next_rank=(rank + direction) % ranks,
            previous_rank=(rank - direction) % ranks,
            source=source,
            holder=(rank + direction * t) % ranks,
            held=part(source, t, lambda steps: True),
            visible=part(source, t, lambda steps: t in steps),
            forwarded=part(source, t, lambda steps: last(steps) > t),
            finished=part(source, t, lambda steps: last(steps) == t),
            arriving=part(upcoming, t + 1, lambda steps: True),
            visible_to_holder=part(rank, 0, lambda steps: t > 0 and t in steps),
            finished_by_holder=part(rank, 0, lambda steps: t > 0 and last(steps) == t),
        )

    return tuple(step(t) for t in range(max(map(last, chain.from_iterable(used))) + 2))
