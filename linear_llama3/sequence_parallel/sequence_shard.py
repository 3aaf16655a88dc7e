"""One rank's shard of a global sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from ..ops.documents import check_edges, drop_empty, read_cu_seqlens
from ..ops.local_passes import LocalDocuments
from ..ops.visibility import Span
from .collectives import group_rank, world_size
from .layout import Layout, check_length, get_layout


class LocalChunk(NamedTuple):
    """A chunk of the layout on this rank, by the rank's local documents in it."""

    opening: int | None  # the document that continues from an earlier chunk
    closing: int | None  # the last document, which may continue in a later chunk; None without tokens
    passes_states_through: bool  # no document starts here, so that a state that enters also leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceShard:
    """One rank's shard of a sequence: the true tokens that it holds, and the pieces of documents they belong to."""

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
        """The number of true tokens held, which come first."""
        return count(self.spans)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Local edges of the pieces of documents, (0, ..., tokens); no piece spans two chunks."""
        edges = [0]
        for span in self.spans:
            edges += [edges[-1] + edge - span[0] for edge in self._cuts(span)[1:]]
        return tuple(edges)

    @property
    def chunks(self) -> tuple[LocalChunk, ...]:
        """This rank's chunks, in the order in which it holds them."""
        chunks, first = [], 0
        for start, stop in self.spans:
            pieces = len(self._cuts((start, stop))) - 1
            continues = start < stop and start not in self.documents
            opening, closing = first if continues else None, first + pieces - 1 if pieces else None
            chunks.append(LocalChunk(opening, closing, passes_states_through=pieces <= continues))
            first += pieces
        return tuple(chunks)

    @property
    def local_documents(self) -> LocalDocuments:
        """The pieces of documents: a state enters and leaves every chunk."""
        chunks = self.chunks
        return LocalDocuments(self.boundaries, tuple(c.opening for c in chunks), tuple(c.closing for c in chunks))

    def _cuts(self, span: Span) -> tuple[int, ...]:
        start, stop = span
        inner = [edge for edge in self.documents if start < edge < stop]
        return (start, *inner, stop) if start < stop else (start,)


def count(spans: tuple[Span, ...]) -> int:
    """Count the tokens in these spans."""
    return sum(stop - start for start, stop in spans)


def resolve_shard(
    tokens: int,
    *,
    batch: int,
    group: dist.ProcessGroup | None,
    layout: str,
    cu_seqlens: Tensor | None,
    length: int | None,
) -> SequenceShard:
    """Check the description of the complete sequence and find this rank's shard.

    Args:
        tokens: the local length C, padding included.
        cu_seqlens: global document edges `[N + 1]`, ending at the true length.
        length: the true global length; default: the end of `cu_seqlens`, else W * C.
    """
    ranks = world_size(group)
    rule, padded = get_layout(layout, ranks), tokens * ranks
    edges = None if cu_seqlens is None else drop_empty(read_cu_seqlens(cu_seqlens))
    if length is None:
        # `shard` pads to a multiple: edges that end in the last padding give the length.
        length = edges[-1] if edges and rule.padded(edges[-1], ranks) == padded else padded
    check_length(tokens, ranks, layout, length)
    if edges is not None:
        check_edges(edges, batch=batch, tokens=length)
    return SequenceShard(
        rank=group_rank(group),
        local=tokens,
        layout=rule,
        all_spans=tuple(rule.spans(rank, ranks, length, padded) for rank in range(ranks)),
        documents=edges or (0, length),
        packed=edges is not None,
    )
