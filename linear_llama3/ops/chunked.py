"""Linear attention in chunks: matrix products inside a chunk, the recurrence only from chunk to chunk.

PyTorch, any device. The backward pass is written by hand (arXiv 2502.07563 with decay folded in; 2312.06635 for
gates): it recomputes the states of a block from the one saved at its left edge, so memory is linear in T with a
small constant. Every exponent is a difference of cumulated log decays and <= 0: nothing overflows, and no prefix
products are divided.

`exchange` is where other devices come in: this device holds one or more links of a longer chain; it starts sending the
total state of each and returns a function that waits for the states entering from the others. The products that need no
state run in between. Without it, the same code is attention on one device.

Shapes: q `[B, H, n, C * G, D_k]` (the G query heads of a kv head are rows), k `[B, H, n, C, D_k]`,
v `[B, H, n, C, D_v]`, b `[B, H, n, C, 1 or D_k]` the log decay cumulated inside the chunk, own token included, or
None (in float64, so that strong decays leave the small ones behind them exact); states `[B, H, (n,) D_k, D_v]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunks import Block, Chunks
from .precision import without_autocast, working_dtype
from .scores import repeat_rows, scores, scores_backward

NOTHING_LEFT = -1e4  # a log decay whose factor is 0 in any precision; -inf - -inf would be nan
States = dict[int, Tensor]  # document -> state; zero where there is none


class Link(NamedTuple):
    """Tokens of this device that follow one another in the sequence: the documents [first, stop) of its stream."""

    first: int
    stop: int  # equal to `first` where the link holds no token
    left_open: bool  # its first document began earlier in the sequence


class Exchange(Protocol):
    """The exclusive affine scan of (state, decay) over the links of all devices, seen from one of them."""

    @property
    def links(self) -> Sequence[Link]:
        """Those of this device, L of them."""

    def start(self, summarize: Callable[[], tuple[Tensor, Tensor]], *, reverse: bool) -> Callable[[], Tensor]:
        """Starts sending `summarize()`, the states `[L, B, H, D_k, D_v]` and decay factors `[L, B, H, D_k]` of this
        device's links; the result waits for the states `[L, B, H, D_k, D_v]` that enter them from the earlier
        (reverse: later) links."""


def chunked_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    boundaries: tuple[int, ...],
    initial_state: Tensor | None = None,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `recurrent_linear_attention`. With `exchange` the first and the last document of a link may
    go on elsewhere, `boundaries` may be (0,) for a device without tokens, and the final states are not to be used."""
    chunks = Chunks(boundaries, q.device)
    return _Chunked.apply(q, k, v, log_decay, initial_state, chunks, scale, exchange)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        chunks: Chunks,
        scale: float,
        exchange: Exchange | None,
    ) -> tuple[Tensor, Tensor]:
        stream = _Stream(q, k, v, log_decay, scale)
        inside: Iterable[Tensor] = (_inside(*stream.load(block)) for block in chunks.blocks)
        if exchange is not None:
            wait = exchange.start(lambda: _total_states(stream, chunks, exchange.links), reverse=False)
            inside = list(inside)  # needs no state: runs while the states travel
            initial_state = wait()  # also where no document goes on: every rank takes part

        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=stream.dtype, device=q.device)
        entering = _entering(stream, initial_state, exchange)
        state, edges, finals = stream.zero_state(), [], {}
        for block, part in zip(chunks.blocks, inside, strict=True):
            edges.append(state)
            query, key, value, b = stream.load(block)
            before, state, ended = _fold_states(block, key, value, b, state, entering)
            finals.update(ended)
            block.put(part.add_(_from_start(query, b) @ before), out, stream.groups)

        ctx.save_for_backward(q, k, v, log_decay, initial_state, torch.stack(edges) if edges else None)
        ctx.chunks, ctx.scale, ctx.exchange = chunks, scale, exchange
        ctx.set_materialize_grads(False)
        return out, torch.cat([finals[n] for n in range(chunks.documents)] or [state])

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, initial_state, edges = ctx.saved_tensors
        chunks, exchange = ctx.chunks, ctx.exchange
        assert exchange is None or d_final is None, "final states of a shard have no gradient"
        stream = _Stream(q, k, v, log_decay, ctx.scale)
        if d_out is None:
            d_out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=stream.dtype, device=q.device)
        entering, leaving = _entering(stream, initial_state, exchange), stream.per_document(d_final)
        inside: Iterable[tuple[Tensor, Tensor, Tensor]] = (
            _inside_backward(*stream.load(block), stream.rows(block, d_out)) for block in reversed(chunks.blocks)
        )
        if exchange is not None:
            wait = exchange.start(lambda: _total_gradients(stream, d_out, chunks, exchange.links), reverse=True)
            inside = list(inside)
            links = zip(exchange.links, wait(), strict=True)
            leaving = {link.stop - 1: x for link, x in links if link.stop > link.first}

        gradients: list[Any] = [None if x is None else torch.empty_like(x) for x in (q, k, v, log_decay)]
        d_state, d_initial = stream.zero_state(), {}
        for i, (block, parts) in enumerate(zip(reversed(chunks.blocks), inside, strict=True)):
            edge = edges[len(chunks.blocks) - 1 - i]
            d_state, began = _block_backward(
                stream, block, d_out, parts, (edge, entering), (d_state, leaving), gradients
            )
            d_initial.update(began)
        d_start = None
        if ctx.needs_input_grad[4]:
            d_start = torch.cat([d_initial[n] for n in range(chunks.documents)]).to(initial_state.dtype)
        return (*gradients, d_start, None, None, None)


class _Stream:
    """The inputs, read block by block in the working precision."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float) -> None:
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.log_decay = log_decay.unsqueeze(-1) if log_decay is not None and log_decay.dim() == 3 else log_decay
        self.dtype = working_dtype(q)
        self.groups = q.shape[2] // k.shape[2]

    def load(self, block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        query = self.rows(block, self.q) * self.scale
        b = None
        if self.log_decay is not None:
            b = block.take(self.log_decay, torch.float64).clamp_(min=NOTHING_LEFT).cumsum(-2)
        return query, block.take(self.k, self.dtype), block.take(self.v, self.dtype), b

    def rows(self, block: Block, x: Tensor) -> Tensor:
        return block.take(x, self.dtype, self.groups)

    def zero_state(self) -> Tensor:
        batch, _, heads, key_dim = self.k.shape
        return torch.zeros(batch, heads, key_dim, self.v.shape[-1], dtype=self.dtype, device=self.k.device)

    def per_document(self, states: Tensor | None) -> States:
        """`[B or N, H, D_k, D_v]` to one `[B, H, D_k, D_v]` for every document."""
        if states is None:
            return {}
        return dict(enumerate(states.to(self.dtype).unflatten(0, (-1, self.k.shape[0]))))


def _from_start(query: Tensor, b: Tensor | None) -> Tensor:
    """The queries as they read the state before the chunk."""
    return query if b is None else query * repeat_rows(b.to(query.dtype), query).exp()


def _to_end(key: Tensor, b: Tensor | None) -> Tensor:
    """The keys as they write to the state after the chunk."""
    return key if b is None else key * (b[..., -1:, :] - b).to(key.dtype).exp()


def _factor(b: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The decay of a state over the whole chunk, `[B, H, n, 1 or D_k, 1]`."""
    return None if b is None else b[..., -1, :].to(dtype).exp().unsqueeze(-1)


def _inside(query: Tensor, key: Tensor, value: Tensor, b: Tensor | None) -> Tensor:
    return scores(query, key, b) @ value


def _inside_backward(
    query: Tensor, key: Tensor, value: Tensor, b: Tensor | None, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_value = scores(query, key, b).mT @ d_out
    d_query, d_key = scores_backward(query, key, b, d_out @ value.mT)
    return d_query, d_key, d_value


def _fold(
    updates: Tensor,
    factors: Tensor | None,
    state: Tensor,
    order: Iterable[int],
    opens: Sequence[int | None],
    closes: Sequence[int | None],
    entering: States,
) -> tuple[Tensor, Tensor, States]:
    """X <- e^A X + U from chunk to chunk, starting anew (from `entering`) where a document opens.

    Returns what every chunk receives `[B, H, n, D_k, D_v]`, what the last one hands on, and what leaves each
    document that closes.
    """
    received = torch.empty_like(updates)
    closed: States = {}
    for c in order:
        if (document := opens[c]) is not None:
            state = entering.get(document, torch.zeros_like(state))
        received[:, :, c] = state
        state = updates[:, :, c] + (state if factors is None else factors[:, :, c] * state)
        if (document := closes[c]) is not None:
            closed[document] = state
    return received, state, closed


def _fold_states(
    block: Block, key: Tensor, value: Tensor, b: Tensor | None, state: Tensor, entering: States
) -> tuple[Tensor, Tensor, States]:
    updates = _to_end(key, b).mT @ value
    return _fold(updates, _factor(b, updates.dtype), state, range(block.size), block.first, block.last, entering)


def _fold_gradients(
    block: Block, query: Tensor, d_out: Tensor, b: Tensor | None, d_state: Tensor, leaving: States
) -> tuple[Tensor, Tensor, States]:
    updates = _from_start(query, b).mT @ d_out
    order = range(block.size - 1, -1, -1)
    return _fold(updates, _factor(b, updates.dtype), d_state, order, block.last, block.first, leaving)


def _block_backward(
    stream: _Stream,
    block: Block,
    d_out: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    states: tuple[Tensor, States],
    d_states: tuple[Tensor, States],
    gradients: list[Any],
) -> tuple[Tensor, States]:
    """Adds what flows through the states to the gradients from inside the chunks, and writes them out."""
    query, key, value, b = stream.load(block)
    d_rows, written = stream.rows(block, d_out), _to_end(key, b)
    updates, factors = written.mT @ value, _factor(b, stream.dtype)
    before, _, _ = _fold(updates, factors, states[0], range(block.size), block.first, block.last, states[1])
    d_after, d_state, began = _fold_gradients(block, query, d_rows, b, *d_states)

    d_query, d_key, d_value = parts
    from_start, to_end = d_rows @ before.mT, value @ d_after.mT
    if b is not None and factors is not None:
        from_start *= repeat_rows(b.to(stream.dtype), query).exp()
        to_end *= (b[..., -1:, :] - b).to(stream.dtype).exp()
    d_query, d_key, d_value = d_query + from_start, d_key + to_end, d_value + written @ d_after
    if b is not None and factors is not None:
        ends = updates + factors * before
        gate = _gate_gradient(query, d_query, key, d_key, ends, d_after, scalar=b.shape[-1] == 1)
        block.put(gate, gradients[3].unsqueeze(-1) if gradients[3].dim() == 3 else gradients[3])
    block.put(d_query * stream.scale, gradients[0], stream.groups)
    block.put(d_key, gradients[1])
    block.put(d_value, gradients[2])
    return d_state, began


def _gate_gradient(
    query: Tensor, d_query: Tensor, key: Tensor, d_key: Tensor, ends: Tensor, d_ends: Tensor, *, scalar: bool
) -> Tensor:
    """dg_i = sum_{l >= i} (q dq - k dk)_l inside the chunk, plus what crosses its right edge, rowsum(S * dS)."""
    flow = (query * d_query).unflatten(-2, (key.shape[-2], -1)).sum(-2) - key * d_key
    crossing = (ends * d_ends).sum(-1).unsqueeze(-2)
    if scalar:
        flow, crossing = flow.sum(-1, keepdim=True), crossing.sum(-1, keepdim=True)
    return flow.flip(-2).cumsum(-2).flip(-2) + crossing


def _entering(stream: _Stream, states: Tensor | None, exchange: Exchange | None) -> States:
    """The states that documents begin with: given for each, or received for the links."""
    if exchange is None or states is None:
        return stream.per_document(states)
    return {link.first: x for link, x in zip(exchange.links, states, strict=True) if link.left_open}


def _total_states(stream: _Stream, chunks: Chunks, links: Sequence[Link]) -> tuple[Tensor, Tensor]:
    """What each link writes into the state that leaves it, and by how much it decays the one that enters."""
    states = []
    for link in links:
        state = stream.zero_state()
        for block in chunks.document(link.stop - 1).blocks if link.stop > link.first else ():
            _, key, value, b = stream.load(block)
            _, state, _ = _fold_states(block, key, value, b, state, {})
        states.append(state)
    return torch.stack(states), _total_factors(stream, chunks, links)


def _total_gradients(stream: _Stream, d_out: Tensor, chunks: Chunks, links: Sequence[Link]) -> tuple[Tensor, Tensor]:
    """The gradients of the states that enter, as far as they come from the links' own outputs; and the decays."""
    d_states = []
    for link in links:
        d_state = stream.zero_state()
        for block in reversed(chunks.document(link.first).blocks) if link.left_open else ():
            query, _, _, b = stream.load(block)
            _, d_state, _ = _fold_gradients(block, query, stream.rows(block, d_out), b, d_state, {})
        d_states.append(d_state)
    return torch.stack(d_states), _total_factors(stream, chunks, links)


def _total_factors(stream: _Stream, chunks: Chunks, links: Sequence[Link]) -> Tensor:
    batch, _, heads, key_dim = stream.k.shape
    factors = torch.ones(len(links), batch, heads, key_dim, dtype=stream.dtype, device=stream.k.device)
    for factor, link in zip(factors, links, strict=True):
        if link.stop == link.first:
            continue  # no token, no change
        if link.stop - link.first > 1 or not link.left_open:
            factor.zero_()  # a document starts here: nothing of the entering state is left
        elif stream.log_decay is not None:
            start, stop = chunks.boundaries[link.first : link.first + 2]
            factor *= stream.log_decay[:, start:stop].double().sum(1).exp().to(stream.dtype)
    return factors
