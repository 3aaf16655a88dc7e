"""Cut a stream of packed documents into segments that run in parallel, and those into chunks.

A scan over chunks is sequential; where batch and heads do not fill the device, a document is cut into several segments,
whose states are found first and merged. No segment and no chunk crosses the edge of a document.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..local_passes import Documents
from .merge import CONTINUE, NOTHING, ZERO, MergeStep, merge_steps

SHORTEST = 2048  # tokens of a segment


class Segment(NamedTuple):
    start: int  # tokens [start, stop)
    stop: int
    document: int
    opens: bool  # the document begins here
    closes: bool


class Segments:
    """The segments of a stream, none longer than `length`, and their chunks of `chunk` tokens."""

    def __init__(self, boundaries: tuple[int, ...], *, length: int, chunk: int, device: torch.device) -> None:
        assert length % chunk == 0, "chunks are counted from the start of a segment"
        self.device = device
        self.list: list[Segment] = []
        for n, (start, stop) in enumerate(itertools.pairwise(boundaries)):
            edges = [*range(start, stop, length), stop]
            self.list += [Segment(a, b, n, a == start, b == stop) for a, b in itertools.pairwise(edges)]
        self.documents = len(boundaries) - 1
        chunks = [[(a, min(a + chunk, s.stop)) for a in range(s.start, s.stop, chunk)] for s in self.list]
        self.first_chunk = list(itertools.accumulate([len(c) for c in chunks], initial=0))
        self.chunks = self._tensor([edge for c in chunks for edge in c], columns=2)  # int32 [chunks, 2]: start, stop
        # kept on the device: a copy would wait for it
        self.table = functools.cache(self._table)
        self.entering_steps = functools.cache(self._entering_steps)
        self.document_steps = functools.cache(self._document_steps)
        self.last_of_documents = functools.cache(self._last_of_documents)

    def __len__(self) -> int:
        return len(self.list)

    @property
    def one_per_document(self) -> bool:
        """True if every document is one segment."""
        return len(self.list) == self.documents

    def _tensor(self, rows: Sequence[tuple[int, ...]], columns: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32).view(-1, columns).to(self.device)

    def _table(self, which: tuple[int, ...] | None) -> Tensor:
        """int32 `[n, 3]`: start, stop and first chunk of all segments, or of these."""
        which = tuple(range(len(self.list))) if which is None else which
        return self._tensor([(self.list[s].start, self.list[s].stop, self.first_chunk[s]) for s in which], columns=3)

    def _last_of_documents(self, *, reverse: bool) -> Tensor:
        """int64 `[documents]`: the last (reverse: the first) segment of each."""
        ends = [s for s, x in enumerate(self.list) if (x.opens if reverse else x.closes)]
        return torch.tensor(ends).to(self.device)

    def needed(self, documents: Documents, *, reverse: bool) -> tuple[int, ...]:
        """The segments whose own states are needed: those that others follow, and all of these documents."""
        parts = enumerate(self.list)
        return tuple(i for i, s in parts if not (s.opens if reverse else s.closes) or s.document in documents)

    def _entering_steps(self, folded: tuple[int, ...], starts: Documents, *, reverse: bool) -> Tensor:
        """Steps of a merge that stores the state before every segment; `folded` are the segments whose states are
        merged. A document in `starts` begins with the initial state at its place there, others from zero."""
        initial = {document: i for i, document in enumerate(starts)}
        place = {segment: i for i, segment in enumerate(folded)}
        return merge_steps(
            [
                MergeStep(
                    fold=place.get(segment, NOTHING),
                    store=segment,
                    start=initial.get(document, ZERO) if begins else CONTINUE,
                )
                for segment, document, begins in self._order(reverse=reverse)
            ],
            self.device,
        )

    def _document_steps(self, folded: tuple[int, ...], documents: Documents, *, reverse: bool) -> Tensor:
        """Steps of a merge that stores the state of each of these documents, from zero; None is zero."""
        place = {segment: i for i, segment in enumerate(folded)}
        steps = []
        for target, wanted in enumerate(documents):
            parts = [(s, begins) for s, document, begins in self._order(reverse=reverse) if document == wanted]
            steps += [MergeStep(fold=place[s], start=ZERO if begins else CONTINUE) for s, begins in parts]
            steps.append(MergeStep(store=target, start=CONTINUE if parts else ZERO))
        return merge_steps(steps, self.device)

    def _order(self, *, reverse: bool) -> list[tuple[int, int, bool]]:
        """(segment, document, whether the document starts with it) in the order of a scan."""
        rows = [(i, s.document, s.closes if reverse else s.opens) for i, s in enumerate(self.list)]
        return rows[::-1] if reverse else rows


def cut(boundaries: tuple[int, ...], *, length: int, chunk: int, device: torch.device) -> Segments:
    """The segments of these documents; those of the last 64 calls that differ are kept."""
    segments = _cut(boundaries, length=length, chunk=chunk, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.add(segments)
    return segments


@functools.lru_cache(maxsize=64)
def _cut(boundaries: tuple[int, ...], *, length: int, chunk: int, device: torch.device) -> Segments:
    return Segments(boundaries, length=length, chunk=chunk, device=device)


_captured: set[Segments] = set()  # CUDA graphs read their tables for good


def segment_length(k: Tensor, v: Tensor) -> int:
    """Tokens of a segment, a multiple of every chunk: short enough that programs of 64 columns fill the device twice,
    long enough that their states are few."""
    batch, tokens, heads, _ = k.shape
    programs = max(batch * heads * -(-v.shape[3] // 64), 1)
    wanted = -(-2 * processors(k.device) // programs)
    return max(SHORTEST, -(-tokens // (wanted * 128)) * 128)


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
