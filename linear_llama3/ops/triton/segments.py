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
    number: int
    start: int  # tokens [start, stop)
    stop: int
    first_chunk: int
    document: int
    begins: bool  # a scan of the document begins here
    ends: bool


class Segments:
    """The segments of a stream, none longer than `length`, and their chunks of `chunk` tokens."""

    def __init__(self, boundaries: tuple[int, ...], *, length: int, chunk: int, device: torch.device) -> None:
        assert length % chunk == 0, "chunks are counted from the start of a segment"
        self.device, self.documents = device, len(boundaries) - 1
        self.list: list[Segment] = []
        chunks: list[tuple[int, int]] = []
        for n, (start, stop) in enumerate(itertools.pairwise(boundaries)):
            for a in range(start, stop, length):
                b = min(a + length, stop)
                self.list.append(Segment(len(self.list), a, b, len(chunks), n, a == start, b == stop))
                chunks += [(c, min(c + chunk, b)) for c in range(a, b, chunk)]
        self.chunks = self._tensor(chunks, columns=2)  # int32 [chunks, 2]: start, stop
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

    def in_order(self, *, reverse: bool) -> list[Segment]:
        """The segments in the order of a scan; in reverse, documents begin at their ends."""
        if not reverse:
            return self.list
        return [s._replace(begins=s.ends, ends=s.begins) for s in reversed(self.list)]

    def needed(self, documents: Documents, *, reverse: bool) -> tuple[int, ...]:
        """The segments whose own states are needed: those that others follow, and all of these documents."""
        order = self.in_order(reverse=reverse)
        return tuple(sorted(s.number for s in order if not s.ends or s.document in documents))

    def _tensor(self, rows: Sequence[tuple[int, ...]], columns: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32).view(-1, columns).to(self.device)

    def _table(self, which: tuple[int, ...] | None) -> Tensor:
        """int32 `[n, 3]`: start, stop and first chunk of all segments, or of these."""
        segments = self.list if which is None else [self.list[i] for i in which]
        return self._tensor([(s.start, s.stop, s.first_chunk) for s in segments], columns=3)

    def _last_of_documents(self, *, reverse: bool) -> Tensor:
        """int64 `[documents]`: the last (reverse: the first) segment of each."""
        return torch.tensor(sorted(s.number for s in self.in_order(reverse=reverse) if s.ends)).to(self.device)

    def _entering_steps(self, folded: tuple[int, ...], starts: Documents, *, reverse: bool) -> Tensor:
        """Steps of a merge that stores the state before every segment; `folded` are the segments whose states are
        merged. A document in `starts` begins with the initial state at its place there, others from zero."""
        initial = {document: i for i, document in enumerate(starts)}
        place = {segment: i for i, segment in enumerate(folded)}
        steps = []
        for s in self.in_order(reverse=reverse):
            start = initial.get(s.document, ZERO) if s.begins else CONTINUE
            steps.append(MergeStep(fold=place.get(s.number, NOTHING), store=s.number, start=start))
        return merge_steps(steps, self.device)

    def _document_steps(self, folded: tuple[int, ...], documents: Documents, *, reverse: bool) -> Tensor:
        """Steps of a merge that stores the state of each of these documents, from zero; None is zero."""
        place = {segment: i for i, segment in enumerate(folded)}
        steps = []
        for target, document in enumerate(documents):
            parts = [s for s in self.in_order(reverse=reverse) if s.document == document]
            steps += [MergeStep(fold=place[s.number], start=ZERO if s.begins else CONTINUE) for s in parts]
            steps.append(MergeStep(store=target, start=CONTINUE if parts else ZERO))
        return merge_steps(steps, self.device)


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
