"""Linear attention on a GPU: which kernel runs when, forward and backward.

Forward: where a document is cut into segments, or shared with other devices, a scan over k and v finds each segment's
own state; a merge turns them into the states that enter; the output kernel makes one pass over q, k and v.
Backward: a scan writes the state before every chunk, a mirrored one over q and d_out the gradient of the state behind
it; then all chunks are worked on at once. Kept in between are the inputs and the states that enter the segments.

Other devices are seen through `ops.exchange.Exchange`: what they send travels while this one computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..exchange import Exchange
from .launch import Launcher, aligned, merge
from .segments import Segments, cut, segment_length

Boundaries = tuple[int, ...]


class Pass:
    """One direction in time: forward over (k, v), in reverse over (q, d_out)."""

    def __init__(
        self, launcher: Launcher, boundaries: Boundaries, *, reverse: bool,
        operands: tuple[Tensor, Tensor] | None = None, scale: float = 1.0,
    ) -> None:  # fmt: skip
        self.launcher, self.reverse, self.scale = launcher, reverse, scale
        self.operands = (launcher.k, launcher.v) if operands is None else operands
        length = segment_length(launcher.k, launcher.v)
        self.segments = cut(boundaries, length=length, chunk=launcher.chunk, device=launcher.k.device)
        launcher.cumulate_gate(self.segments)
        self.documents: tuple[int, ...] = ()  # those whose total state other devices need
        self._pieces: tuple[tuple[int, ...], Tensor, Tensor | None] | None = None

    def send(self, exchange: Exchange) -> Callable[[], Tensor]:
        """Starts the exchange; the result waits for the states `[L, B, H, K, V]` that enter the links."""
        links = exchange.links
        if self.reverse:
            self.documents = tuple(link.first if link.left_open else -1 for link in links)
        else:
            self.documents = tuple(link.stop - 1 if link.stop > link.first else -1 for link in links)
        return exchange.start(lambda: (self._totals(), self._factors(exchange)), reverse=self.reverse)

    def enter(self, given: Tensor | None, owners: tuple[int, ...]) -> Tensor | None:
        """The state `[B, segments, H, K, V]` that each segment starts from; `owners[d]` says which of the given states
        `[n, B, H, K, V]` document d starts from, -1: zero."""
        if self.segments.whole and given is None:
            return None
        which, states, factors = self._pieces or self._own_states(())  # what was sent already holds them
        steps = self.segments.steps(which, owners, reverse=self.reverse)
        return merge(states, factors, steps, len(self.segments), given)

    def chunk_states(self, entering: Tensor | None, *, ends: bool = False) -> tuple[Tensor, Tensor | None]:
        states, end_states, _ = self.launcher.scan(
            *self.operands, self.segments, None, scale=self.scale,
            entering=entering, states=True, ends=ends, reverse=self.reverse,
        )  # fmt: skip
        assert states is not None
        return states, end_states

    def of_documents(self, ends: Tensor) -> Tensor:
        """The states `[B, segments, ...]` behind all segments as those behind the documents, `[B or N, H, K, V]`."""
        if not self.segments.whole:
            ends = ends.index_select(1, self.segments.edges(reverse=self.reverse))
        return ends.transpose(0, 1).flatten(0, 1)

    def _own_states(self, documents: tuple[int, ...]) -> tuple[tuple[int, ...], Tensor, Tensor | None]:
        """Of each segment that others follow or that is part of these documents, as if nothing entered it."""
        if self._pieces is None:
            which = self.segments.folded(documents, reverse=self.reverse)
            _, states, factors = self.launcher.scan(
                *self.operands, self.segments, which, scale=self.scale, ends=True, reverse=self.reverse
            )
            assert states is not None, "asked for"
            self._pieces = which, states.transpose(0, 1), None if factors is None else factors.transpose(0, 1)
        return self._pieces

    def _totals(self) -> Tensor:
        which, states, factors = self._own_states(self.documents)
        steps = self.segments.total_steps(which, self.documents, reverse=self.reverse)
        return merge(states, factors, steps, len(self.documents)).transpose(0, 1)

    def _factors(self, exchange: Exchange) -> Tensor:
        """By how much each link decays what passes through it, `[L, B, H, K]`: not at all where it has no token,
        to nothing where a document starts."""
        which, states, pieces = self._own_states(self.documents)
        factors = torch.ones(len(exchange.links), *states.shape[1:-1], device=states.device)
        for factor, link in zip(factors, exchange.links, strict=True):
            if link.stop > link.first + 1 or (link.stop > link.first and not link.left_open):
                factor.zero_()
            elif link.stop > link.first and pieces is not None:
                own = [i for i, s in enumerate(which) if self.segments.list[s].document == link.first]
                factor.copy_(pieces[own].prod(0))
        return factors


class Sent(NamedTuple):
    """A forward pass whose states are on their way to other devices."""

    scan: Pass
    exchange: Exchange
    wait: Callable[[], Tensor]


@torch.no_grad()
def send_states(k: Tensor, v: Tensor, log_decay: Tensor | None, boundaries: Boundaries, exchange: Exchange) -> Sent:
    _, k, v, log_decay = aligned(k, k, v, log_decay)
    scan = Pass(Launcher(k, v, log_decay), boundaries, reverse=False)
    return Sent(scan, exchange, scan.send(exchange))


def sharded_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, sent: Sent, scale: float, out_dtype: torch.dtype
) -> Tensor:
    """Attention that goes on elsewhere; `sent` is what `send_states` made of k, v and the log decay."""
    value_dim = v.shape[-1]
    q, k, v, log_decay = aligned(q, k, v, log_decay)
    return _Sharded.apply(q, k, v, log_decay, sent, scale, out_dtype)[..., :value_dim]


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        sent: Sent,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        scan, exchange, wait = sent
        entering = scan.enter(wait(), owners(exchange, scan.segments.documents, reverse=False))
        out, _ = scan.launcher.output(q.contiguous(), scan.segments, entering, scale=scale, dtype=dtype, ends=False)
        ctx.save_for_backward(q, k, v, log_decay, entering)
        ctx.boundaries, ctx.exchange, ctx.scale = scan.segments.boundaries, exchange, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        q, k, v, log_decay, entering = ctx.saved_tensors
        gradients = run_backward(
            q, k, v, log_decay, entering, d_out, None, ctx.boundaries, ctx.scale,
            gate=ctx.needs_input_grad[3], exchange=ctx.exchange,
        )  # fmt: skip
        return (*gradients[:4], None, None, None)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor | None,
    boundaries: Boundaries, scale: float, *, final: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """On one device: out, the states behind the documents and those that enter the segments."""
    scan = Pass(Launcher(k, v, log_decay), boundaries, reverse=False)
    entering = scan.enter(*by_document(initial, k, scan.segments))
    out, ends = scan.launcher.output(q.contiguous(), scan.segments, entering, scale=scale, dtype=dtype, ends=final)
    return out, None if ends is None else scan.of_documents(ends), entering


def run_backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, entering: Tensor | None, d_out: Tensor,
    d_final: Tensor | None, boundaries: Boundaries, scale: float, *,
    gate: bool, initial: bool = False, exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of q, k, v, the log decay (if `gate`) and the initial states (if `initial`)."""
    launcher = Launcher(k, v, log_decay, backward=True, gate_gradient=gate)
    q, d_out = q.contiguous(), d_out.contiguous()
    scan = Pass(launcher, boundaries, reverse=False)
    mirrored = Pass(launcher, boundaries, reverse=True, operands=(q, d_out), scale=scale)
    wait = None if exchange is None else mirrored.send(exchange)
    states, _ = scan.chunk_states(entering)  # while the gradients of states travel
    given, starts = by_document(d_final, k, scan.segments)
    if wait is not None and exchange is not None:
        given, starts = wait(), owners(exchange, scan.segments.documents, reverse=True)
    d_states, d_ends = mirrored.chunk_states(mirrored.enter(given, starts), ends=initial)
    dq, dk, dv, d_gate = launcher.gradients(q, d_out, scan.segments, states, d_states, scale=scale)
    d_gate = d_gate.to(log_decay.dtype) if gate and log_decay is not None and d_gate is not None else None
    return dq, dk, dv, d_gate, None if d_ends is None else mirrored.of_documents(d_ends)


def by_document(states: Tensor | None, k: Tensor, segments: Segments) -> tuple[Tensor | None, tuple[int, ...]]:
    """States `[B or N, H, K, V]` as `[N, B, H, K, V]`, document d starting from state d."""
    if states is None:
        return None, (-1,) * segments.documents
    return states.float().unflatten(0, (-1, k.shape[0])), tuple(range(segments.documents))


def owners(exchange: Exchange, documents: int, *, reverse: bool) -> tuple[int, ...]:
    """Which link's entering state each document starts from, -1: none."""
    starts = [-1] * documents
    for n, link in enumerate(exchange.links):
        if link.stop > link.first and (reverse or link.left_open):
            starts[link.stop - 1 if reverse else link.first] = n
    return tuple(starts)
