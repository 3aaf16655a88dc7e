"""Linear attention in chunks: matrix products inside a chunk, the recurrence only from chunk to chunk.

PyTorch, any device. The backward pass is written by hand (arXiv 2502.07563 with decay folded in; 2312.06635 for
gates): it recomputes the states of a block from the one saved at its left edge, so memory is linear in T with a
small constant. Every exponent is a difference of cumulated log decays and <= 0: nothing overflows, and no prefix
products are divided.

`exchange` is where other devices come in: this device holds one or more links of a longer chain, sends the total state
of each and receives those that enter. The products that need no state run while they travel. Without it, the same code
is attention on one device.

Shapes: q `[B, H, n, C * G, D_k]` (the G query heads of a kv head are rows), k `[B, H, n, C, D_k]`,
v `[B, H, n, C, D_v]`; states `[B, H, (n,) D_k, D_v]`; decays: `scores.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .chunks import Block, Chunks, chunks_of
from .exchange import Exchange, Link
from .precision import without_autocast, working_dtype
from .scores import Decay, cumulated_decay, scores, scores_backward

States = dict[int, Tensor]  # document -> state; zero where there is none


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
    wait: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `recurrent_linear_attention`. With `exchange` the first and the last document of a link may
    go on elsewhere, `wait` is what `send_states` gave, `boundaries` may be (0,) for a device without tokens, and the
    final states are not to be used."""
    return _Chunked.apply(q, k, v, log_decay, initial_state, chunks_of(q, k, boundaries), scale, exchange, wait)


@torch.no_grad()
def send_states(
    k: Tensor, v: Tensor, log_decay: Tensor | None, *, boundaries: tuple[int, ...], exchange: Exchange
) -> Callable[[], Tensor]:
    """Starts sending the states of this device's links; the result waits for those that enter them."""
    stream, chunks = _Stream(k, k, v, log_decay, 1.0), chunks_of(k, k, boundaries)
    return exchange.start(lambda: _total_states(stream, chunks, exchange.links), reverse=False)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None,
        chunks: Chunks, scale: float, exchange: Exchange | None, wait: Callable[[], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        inputs = (q, k, v, log_decay)
        out, final, initial_state, edges = run_forward(*inputs, initial_state, chunks, scale, exchange, wait)
        ctx.save_for_backward(*inputs, initial_state, edges)
        ctx.chunks, ctx.scale, ctx.exchange = chunks, scale, exchange
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        gate, initial = ctx.needs_input_grad[3:5]
        gradients = run_backward(
            ctx.saved_tensors, d_out, d_final, ctx.chunks, ctx.scale, ctx.exchange, gate=gate, initial=initial
        )
        return *gradients, None, None, None, None


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    chunks: Chunks,
    scale: float,
    exchange: Exchange | None = None,
    wait: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Out, the final states, the states that entered, and those at the left edges of the blocks."""
    stream = _Stream(q, k, v, log_decay, scale)
    tokens_of = lru_cache(maxsize=1)(partial(_Tokens, stream))  # what a block reads is let go with it
    inside: Iterator[Tensor] = (_inside(tokens_of(block)) for block in chunks.blocks)
    if wait is not None:
        inside = iter(list(inside))  # needs no state: runs while the states travel
        initial_state = wait()  # also where no document goes on: every rank takes part

    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=stream.dtype, device=q.device)
    entering = _entering(stream, initial_state, exchange)
    state, finals = stream.zero_state(), {}
    edges = state.new_empty(len(chunks.blocks), *state.shape)
    for block, edge in zip(chunks.blocks, edges.unbind(), strict=True):
        edge.copy_(state)
        state, ended = _block_forward(tokens_of(block), next(inside), state, entering, out)
        finals.update(ended)
    return out, torch.cat([finals[n] for n in range(chunks.documents)] or [state]), initial_state, edges


@without_autocast
def run_backward(
    saved: Sequence[Any],
    d_out: Tensor | None,
    d_final: Tensor | None,
    chunks: Chunks,
    scale: float,
    exchange: Exchange | None = None,
    *,
    gate: bool,
    initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of q, k, v, and, where asked for, of the log decay and of the initial state; `saved` are these
    five and the states at the left edges of the blocks."""
    q, k, v, log_decay, initial_state, edges = saved
    assert exchange is None or d_final is None, "final states of a shard have no gradient"
    if d_out is None:
        d_out = q.new_zeros(()).expand(*q.shape[:3], v.shape[-1])
    stream = _Stream(q, k, v, log_decay, scale, d_out)
    entering, leaving = _entering(stream, initial_state, exchange), stream.per_document(d_final)
    backwards = chunks.blocks[::-1]
    tokens_of = lru_cache(maxsize=1)(partial(_Tokens, stream))
    inside: Iterator[_Gradients] = (_inside_backward(tokens_of(block), gate=gate) for block in backwards)
    if exchange is not None:
        wait = exchange.start(lambda: _total_gradients(stream, chunks, exchange.links), reverse=True)
        inside = iter(list(inside))
        links = zip(exchange.links, wait(), strict=True)
        leaving = {link.stop - 1: x for link, x in links if link.stop > link.first}

    gradients = [torch.empty_like(x) for x in (q, k, v)]
    if gate:
        gradients.append(stream.empty_gates())
    d_state, d_initial = stream.zero_state(), {}
    for block, edge in zip(backwards, edges.unbind()[::-1], strict=True):
        states, d_states = (edge, entering), (d_state, leaving)
        d_state, began = _block_backward(tokens_of(block), next(inside), states, d_states, gradients)
        d_initial.update(began)
    d_log_decay, d_start = stream.d_log_decay(gradients[3]) if gate else None, None
    if initial:
        d_start = torch.cat([d_initial[n] for n in range(chunks.documents)]).to(initial_state.dtype)
    return gradients[0], gradients[1], gradients[2], d_log_decay, d_start


class _Stream:
    """The inputs, read block by block in the working precision."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, d_out: Tensor | None = None
    ) -> None:
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.dtype = working_dtype(q)
        self.groups = q.shape[2] // k.shape[2]
        self.log_decay = k.new_zeros(k.shape[2], dtype=self.dtype) if log_decay is None else log_decay
        self.d_out = d_out
        self._whole_chunk: Decay | None = None

    def decay(self, block: Block) -> Decay:
        """A constant one is the same for all chunks without empty slots."""
        if self.log_decay.dim() > 1:
            log_decay = block.take(self.log_decay.view(*self.k.shape[:3], -1), self.log_decay.dtype)
            return cumulated_decay(log_decay, self.groups, self.dtype)
        constant = self.log_decay[:, None, None, None].expand(-1, 1, block.chunk_size, 1)  # [H, n, C, 1]
        if block.filled is not None:
            constant = constant.where(block.filled.view(block.size, -1, 1), 0)
            return cumulated_decay(constant, self.groups, self.dtype)
        if self._whole_chunk is None:
            self._whole_chunk = cumulated_decay(constant, self.groups, self.dtype)
        return self._whole_chunk

    def zero_state(self) -> Tensor:
        batch, _, heads, key_dim = self.k.shape
        return torch.zeros(batch, heads, key_dim, self.v.shape[-1], dtype=self.dtype, device=self.k.device)

    def empty_gates(self) -> Tensor:
        """Gradients of the log decay of every token, `[B, T, H, 1 or D_k]`, to be filled."""
        return self.log_decay.new_empty(*self.k.shape[:3], self.k.shape[-1] if self.log_decay.dim() == 4 else 1)

    def d_log_decay(self, gates: Tensor) -> Tensor:
        """The same in the shape of the log decay."""
        if self.log_decay.dim() == 1:
            gates = gates.sum((0, 1), dtype=torch.float64).to(self.log_decay.dtype)
        return gates.view(self.log_decay.shape)

    def per_document(self, states: Tensor | None) -> States:
        """`[B or N, H, D_k, D_v]` to one `[B, H, D_k, D_v]` for every document."""
        if states is None:
            return {}
        return dict(enumerate(states.to(self.dtype).unflatten(0, (-1, self.k.shape[0]))))


class _Tokens:
    """The inputs of a block, each taken when first asked for."""

    def __init__(self, stream: _Stream, block: Block) -> None:
        self.stream, self.block = stream, block

    @cached_property
    def query(self) -> Tensor:
        return self.block.take(self.stream.q, self.stream.dtype, self.stream.groups) * self.stream.scale

    @cached_property
    def key(self) -> Tensor:
        return self.block.take(self.stream.k, self.stream.dtype)

    @cached_property
    def value(self) -> Tensor:
        return self.block.take(self.stream.v, self.stream.dtype)

    @cached_property
    def d_out(self) -> Tensor:
        assert self.stream.d_out is not None, "there is none in a forward pass"
        return self.block.take(self.stream.d_out, self.stream.dtype, self.stream.groups)

    @cached_property
    def decay(self) -> Decay:
        return self.stream.decay(self.block)

    @property
    def reading(self) -> Tensor:
        """The queries as they read the state before the chunk."""
        return self.query * self.decay.from_start

    @cached_property
    def writing(self) -> Tensor:
        """The keys as they write to the state after the chunk."""
        return self.key * self.decay.to_end


class _Gradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    flow: Tensor | None  # of the decay; see `scores_backward`


def _inside(tokens: _Tokens) -> Tensor:
    return scores(tokens.query, tokens.key, tokens.decay) @ tokens.value


def _inside_backward(tokens: _Tokens, *, gate: bool) -> _Gradients:
    s = scores(tokens.query, tokens.key, tokens.decay)
    d_value = s.mT @ tokens.d_out
    ds = tokens.d_out @ tokens.value.mT
    d_query, d_key, flow = scores_backward(tokens.query, tokens.key, tokens.decay, s, ds, gate=gate)
    return _Gradients(d_query, d_key, d_value, flow)


def _fold(
    updates: Tensor,
    factors: Tensor,
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
    places, added, kept = (x.unbind(2) for x in (received, updates, factors.expand_as(updates)))
    for c in order:
        if (document := opens[c]) is not None:
            state = entering.get(document, torch.zeros_like(state))
        places[c].copy_(state)
        state = torch.addcmul(added[c], kept[c], state)
        if (document := closes[c]) is not None:
            closed[document] = state
    return received, state, closed


def _fold_states(tokens: _Tokens, state: Tensor, entering: States) -> tuple[Tensor, Tensor, States]:
    block, updates = tokens.block, tokens.writing.mT @ tokens.value
    return _fold(updates, tokens.decay.whole, state, range(block.size), block.first, block.last, entering)


def _fold_gradients(tokens: _Tokens, d_state: Tensor, leaving: States) -> tuple[Tensor, Tensor, States]:
    block, updates = tokens.block, tokens.reading.mT @ tokens.d_out
    order = range(block.size - 1, -1, -1)
    return _fold(updates, tokens.decay.whole, d_state, order, block.last, block.first, leaving)


def _add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x += a @ b, contiguous."""
    x.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))
    return x


def _block_forward(
    tokens: _Tokens, part: Tensor, state: Tensor, entering: States, out: Tensor
) -> tuple[Tensor, States]:
    """Adds what the queries read from the states, and writes the outputs."""
    before, state, ended = _fold_states(tokens, state, entering)
    tokens.block.put(_add_product(part, tokens.reading, before), out, tokens.stream.groups)
    return state, ended


def _block_backward(
    tokens: _Tokens,
    d: _Gradients,
    states: tuple[Tensor, States],
    d_states: tuple[Tensor, States],
    gradients: Sequence[Tensor],
) -> tuple[Tensor, States]:
    """Adds what flows through the states to the gradients from inside the chunks, and writes them."""
    before, _, _ = _fold_states(tokens, *states)
    d_after, d_state, began = _fold_gradients(tokens, *d_states)
    d_query = (tokens.d_out @ before.mT).mul_(tokens.decay.from_start)
    d_key = (tokens.value @ d_after.mT).mul_(tokens.decay.to_end)
    if d.flow is not None:
        queries = (tokens.query * d_query).unflatten(-2, (tokens.block.chunk_size, -1)).sum(-2)
        across = (before * d_after).sum(-1).mul_(tokens.decay.whole[..., 0]).unsqueeze(-2)
        tokens.block.put(_gate_gradient(d.flow, queries, tokens.key * d_key, across), gradients[3])
    tokens.block.put(d.query.add_(d_query).mul_(tokens.stream.scale), gradients[0], tokens.stream.groups)
    tokens.block.put(d.key.add_(d_key), gradients[1])
    tokens.block.put(_add_product(d.value, tokens.writing, d_after), gradients[2])
    return d_state, began


def _gate_gradient(flow: Tensor, queries: Tensor, keys: Tensor, across: Tensor) -> Tensor:
    """The gradient of a token's log decay: the sum of all that passes the token, from anything before it (the state
    before the chunk, a key) to anything from it on (a query, the state behind the chunk).

    A difference like q dq - k dk would hold the same, but a token's own key and query, which no decay comes between,
    would only cancel up to their rounding.
    """
    if flow.shape[-1] == 1:
        queries, keys, across = (x.sum(-1, keepdim=True) for x in (queries, keys, across))
    to_queries = (flow + queries).flip(-2).cumsum(-2).flip(-2)
    to_state = F.pad(keys[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)
    return to_queries + to_state + across


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
            _, state, _ = _fold_states(_Tokens(stream, block), state, {})
        states.append(state)
    return torch.stack(states), _total_factors(stream, chunks, links)


def _total_gradients(stream: _Stream, chunks: Chunks, links: Sequence[Link]) -> tuple[Tensor, Tensor]:
    """The gradients of the states that enter, as far as they come from the links' own outputs; and the decays."""
    d_states = []
    for link in links:
        d_state = stream.zero_state()
        for block in reversed(chunks.document(link.first).blocks) if link.left_open else ():
            _, d_state, _ = _fold_gradients(_Tokens(stream, block), d_state, {})
        d_states.append(d_state)
    return torch.stack(d_states), _total_factors(stream, chunks, links)


def _total_factors(stream: _Stream, chunks: Chunks, links: Sequence[Link]) -> Tensor:
    batch, tokens, heads, key_dim = stream.k.shape
    log_decay = stream.log_decay.expand(batch, tokens, heads) if stream.log_decay.dim() == 1 else stream.log_decay
    factors = torch.ones(len(links), batch, heads, key_dim, dtype=stream.dtype, device=stream.k.device)
    for factor, link in zip(factors, links, strict=True):
        if link.stop == link.first:
            continue  # no token, no change
        if link.stop - link.first > 1 or not link.left_open:
            factor.zero_()  # a document starts here: nothing of the entering state is left
        else:
            start, stop = chunks.boundaries[link.first : link.first + 2]
            total = log_decay[:, start:stop].sum(1, dtype=torch.float64)
            factor *= total.exp().to(stream.dtype).view(batch, heads, -1)
    return factors
