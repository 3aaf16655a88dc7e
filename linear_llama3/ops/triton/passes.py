"""Linear attention on a GPU: which kernel runs when, forward and backward; the steps are those of `local_passes.py`.

Forward: where a document is cut into segments or shared with other devices, a scan over k and v computes the state that
each segment adds; a merge turns these into the states that enter the segments; the output kernel makes one pass over
q, k and v. Backward: a scan writes the state before every chunk, a mirrored one over q and d_out the gradient of the
state after it; then all chunks run in parallel. The residuals are the states that enter the segments.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..local_passes import Documents, Gradients, LocalDocuments, Output, Residuals
from .launch import Launcher, merge


class SegmentStates(NamedTuple):
    """The states that some segments add, each from zero, and how far they decay what passes through them."""

    segments: tuple[int, ...]
    states: Tensor  # [n, B, H, K, V]
    decays: Tensor | None  # [n, B, H, K]


class DirectionalScan:
    """The recurrence in one direction of time: forward over x, y = k, v; in reverse over q, d_out."""

    def __init__(self, launcher: Launcher, x: Tensor, y: Tensor, *, reverse: bool = False, scale: float = 1.0) -> None:
        self.segments, self.reverse = launcher.segments, reverse
        self._scan = partial(launcher.scan, x, y, scale=scale, reverse=reverse)

    def segment_states(self, documents: Documents = ()) -> SegmentStates:
        """The states of the segments that others follow, and of all segments of these documents."""
        which = self.segments.needed(documents, reverse=self.reverse)
        _, states, decays = self._scan(which, ends=True)
        assert states is not None, "asked for"
        return SegmentStates(which, states.transpose(0, 1), None if decays is None else decays.transpose(0, 1))

    def document_states(self, own: SegmentStates, documents: Documents) -> Tensor:
        """The states `[n, B, H, K, V]` of these documents from zero; `own` holds those of their segments."""
        steps = self.segments.document_steps(own.segments, documents, reverse=self.reverse)
        return merge(own.states, own.decays, steps, len(documents)).transpose(0, 1)

    def entering(self, own: SegmentStates | None, given: Tensor | None, documents: Documents) -> Tensor | None:
        """The state `[B, segments, H, K, V]` that enters each segment, None for zeros everywhere.

        `given` `[n, B, H, K, V]` are the states that these documents start from. `own`: None to compute it here.
        """
        if self.segments.one_per_document and given is None:
            return None
        own = own or self.segment_states()
        starts = documents if given is not None else ()
        steps = self.segments.entering_steps(own.segments, starts, reverse=self.reverse)
        given = None if given is None else given.float()
        return merge(own.states, own.decays, steps, len(self.segments), given)

    def chunk_states(self, entering: Tensor | None, *, ends: bool = False) -> tuple[Tensor, Tensor | None]:
        """The state that every chunk receives, and with `ends` those behind all segments."""
        states, end_states, _ = self._scan(None, entering=entering, states=True, ends=ends)
        assert states is not None, "asked for"
        return states, end_states

    def behind_documents(self, ends: Tensor) -> Tensor:
        """`[B, segments, ...]` behind all segments as `[B or N, H, K, V]` behind all documents."""
        if not self.segments.one_per_document:
            ends = ends.index_select(1, self.segments.last_of_documents(reverse=self.reverse))
        return ends.transpose(0, 1).flatten(0, 1)


class TritonForward:
    """The forward pass of one device's tokens, out in `out_dtype`; head dims are multiples of 8."""

    def __init__(
        self, k: Tensor, v: Tensor, log_decay: Tensor | None, documents: LocalDocuments, *, out_dtype: torch.dtype
    ) -> None:
        self.documents, self.out_dtype = documents, out_dtype
        self.launcher = Launcher(k, v, log_decay, documents.boundaries)
        self.scan = DirectionalScan(self.launcher, self.launcher.k, self.launcher.v)
        self.own: SegmentStates | None = None  # the states of segments, once `summary` has computed them

    def summary(self) -> Tensor:
        self.own = self.scan.segment_states(self.documents.closing)
        return self.scan.document_states(self.own, self.documents.closing)

    def intra_chunk(self, q: Tensor, scale: float) -> None:
        """Do nothing: the output kernel computes both parts in one pass over the tokens."""

    def output(
        self, q: Tensor, scale: float, entering: Tensor | None, intra: None = None, *, final_states: bool = False
    ) -> Output:
        into_segments = self.scan.entering(self.own, entering, self.documents.opening)
        out, ends = self.launcher.output(
            q.contiguous(), into_segments, scale=scale, dtype=self.out_dtype, ends=final_states
        )
        return Output(out, None if ends is None else self.scan.behind_documents(ends), (None, into_segments))


class TritonBackward:
    """The backward pass of one device's tokens."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, documents: LocalDocuments,
        residuals: Residuals, d_out: Tensor, scale: float, *, decay_learns: bool,
    ) -> None:  # fmt: skip
        self.q, self.d_out, self.scale, self.documents = q.contiguous(), d_out.contiguous(), scale, documents
        self.decay_learns = decay_learns
        self.decay_dtype = torch.float32 if log_decay is None else log_decay.dtype
        _, self.into_segments = residuals
        self.launcher = Launcher(k, v, log_decay, documents.boundaries, backward=True, decay_gradient=decay_learns)
        self.scan = DirectionalScan(self.launcher, self.launcher.k, self.launcher.v)
        self.mirrored = DirectionalScan(self.launcher, self.q, self.d_out, reverse=True, scale=scale)
        self.own: SegmentStates | None = None

    def summary(self) -> Tensor:
        self.own = self.mirrored.segment_states(self.documents.opening)
        return self.mirrored.document_states(self.own, self.documents.opening)

    def intra_chunk(self) -> Tensor:
        """The states before the chunks."""
        return self.scan.chunk_states(self.into_segments)[0]

    def gradients(
        self, d_leaving: Tensor | None, intra: Tensor | None = None, *, initial_state: bool = False
    ) -> Gradients:
        states = self.intra_chunk() if intra is None else intra
        d_into_segments = self.mirrored.entering(self.own, d_leaving, self.documents.closing)
        d_states, d_initial = self.mirrored.chunk_states(d_into_segments, ends=initial_state)
        dq, dk, dv, d_decay = self.launcher.gradients(self.q, self.d_out, states, d_states, scale=self.scale)
        d_decay = d_decay.to(self.decay_dtype) if d_decay is not None and self.decay_learns else None
        return Gradients(dq, dk, dv, d_decay, None if d_initial is None else self.mirrored.behind_documents(d_initial))
