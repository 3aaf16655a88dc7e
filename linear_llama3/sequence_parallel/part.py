"""Where a rank stands in one global sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from ..ops.documents import check_edges, drop_empty, read_cu_seqlens
from ..ops.exchange import Link
from ..ops.visibility import Span
from .collectives import group_rank, world_size
from .layout import Layout, check_length, get_layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A rank's part of one sequence: the true tokens that it holds, and the pieces of documents they belong to."""

    rank: int
    local: int  # C, the tokens of every rank, padding included
    layout: Layout
    all_spans: tuple[tuple[Span, ...], ...]  # of every rank: the global positions of its chunks' true tokens
    documents: tuple[int, ...]  # global edges (0, ..., length) of all documents
    packed: bool  # documents were given; the same on every rank

    @property
    def ranks(self) -> int:
        return len(self.all_spans)

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.all_spans[self.rank]

    @property
    def tokens(self) -> int:
        """True tokens held: the first of the local ones."""
        return count(self.spans)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Local edges of the pieces of documents, (0, ..., tokens); no piece reaches over two chunks."""
        edges = [0]
        for span in self.spans:
            edges += [edges[-1] + edge - span[0] for edge in self._cuts(span)[1:]]
        return tuple(edges)

    @property
    def links(self) -> tuple[Link, ...]:
        """The chunks as links of the chain of all ranks' chunks."""
        links, first = [], 0
        for span in self.spans:
            stop = first + len(self._cuts(span)) - 1
            links.append(Link(first, stop, left_open=span[0] < span[1] and span[0] not in self.documents))
            first = stop
        return tuple(links)

    def _cuts(self, span: Span) -> tuple[int, ...]:
        start, stop = span
        inner = [edge for edge in self.documents if start < edge < stop]
        return (start, *inner, stop) if start < stop else (start,)


def count(spans: tuple[Span, ...]) -> int:
    """Tokens in these spans."""
    return sum(stop - start for start, stop in spans)


def locate(
    tokens: int,
    *,
    batch: int,
    group: dist.ProcessGroup | None,
    layout: str,
    cu_seqlens: Tensor | None,
    length: int | None,
) -> Part:
    """Checks what the caller says of the whole sequence, and finds this rank in it.

    Args:
        tokens: the local length C, padding included.
        cu_seqlens: global document edges `[N + 1]`, ending at the true length.
        length: the true global length; default: the end of `cu_seqlens`, else W * C.
    """
    ranks = world_size(group)
    rule, padded = get_layout(layout, ranks), tokens * ranks
    edges = None if cu_seqlens is None else drop_empty(read_cu_seqlens(cu_seqlens))
    if length is None:
        # `shard` pads to a multiple: edges that end in the last padding tell the length.
        length = edges[-1] if edges and rule.padded(edges[-1], ranks) == padded else padded
    check_length(tokens, ranks, layout, length)
    if edges is not None:
        check_edges(edges, batch=batch, tokens=length)
    return Part(
        rank=group_rank(group),
        local=tokens,
        layout=rule,
        all_spans=tuple(rule.spans(rank, ranks, length, padded) for rank in range(ranks)),
        documents=edges or (0, length),
        packed=edges is not None,
    )
