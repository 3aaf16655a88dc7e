"""The products inside one block of chunks, forward and backward, and the scan over its states.

Shapes inside a block of n chunks: q `[B, H, n, C * G, D_k]` (the G query heads of a kv head are rows),
k `[B, H, n, C, D_k]`, v `[B, H, n, C, D_v]`; states `[B, H, (n,) D_k, D_v]`; decays: `intra_chunk.py`.
"""

from __future__ import annotations

from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunks import Block, chunk_size, cut_into_blocks
from .intra_chunk import Decay, cumulated_decay, scores, scores_backward
from .local_passes import Documents, Gradients
from .precision import working_dtype

States = dict[int | None, Tensor]  # document -> state `[B, H, D_k, D_v]`; zero where there is none


class Inputs:
    """The inputs of all tokens, to be read block by block in the working precision."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, boundaries: tuple[int, ...], scale: float,
        d_out: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.scale, self.d_out = q, k, v, scale, d_out
        self.dtype = working_dtype(q)
        self.groups = q.shape[2] // k.shape[2]
        size = chunk_size(boundaries, key_dim=q.shape[-1], groups=self.groups)
        width = max(q.shape[0] * q.shape[2:].numel(), 1)
        self._cut = partial(cut_into_blocks, device=q.device, size=size, width=width)
        self.boundaries, self.blocks = boundaries, self._cut(boundaries)
        self.log_decay = k.new_zeros(k.shape[2], dtype=self.dtype) if log_decay is None else log_decay
        self._full_chunk: Decay | None = None

    def blocks_of(self, document: int | None) -> list[Block]:
        """The blocks of one document alone; none for None."""
        return [] if document is None else self._cut(self.boundaries[document : document + 2])

    def decay(self, block: Block) -> Decay:
        """The decay of a block's chunks; a constant one is the same for all chunks without empty slots."""
        if self.log_decay.dim() > 1:
            log_decay = block.take(self.log_decay.view(*self.k.shape[:3], -1), self.log_decay.dtype)
            return cumulated_decay(log_decay, self.groups, self.dtype)
        constant = self.log_decay[:, None, None, None].expand(-1, 1, block.chunk_size, 1)  # [H, n, C, 1]
        if block.filled is not None:
            constant = constant.where(block.filled.view(block.size, -1, 1), 0)
            return cumulated_decay(constant, self.groups, self.dtype)
        if self._full_chunk is None:
            self._full_chunk = cumulated_decay(constant, self.groups, self.dtype)
        return self._full_chunk

    def zero_state(self) -> Tensor:
        batch, _, heads, key_dim = self.k.shape
        return torch.zeros(batch, heads, key_dim, self.v.shape[-1], dtype=self.dtype, device=self.k.device)

    def by_document(self, states: Tensor | None, documents: Documents) -> States:
        """The states `[n, B, H, D_k, D_v]` of these documents."""
        return {} if states is None else dict(zip(documents, states.to(self.dtype), strict=True))

    def empty_decays(self) -> Tensor:
        """Room for one log decay, or gradient, per token, `[B, T, H, 1 or D_k]`."""
        return self.log_decay.new_empty(*self.k.shape[:3], self.k.shape[-1] if self.log_decay.dim() == 4 else 1)

    def like_decays(self, decays: Tensor) -> Tensor:
        """The same in the shape of `log_decay`: a constant one has the sum over all tokens."""
        if self.log_decay.dim() == 1:
            decays = decays.sum((0, 1), dtype=torch.float64).to(self.log_decay.dtype)
        return decays.view(self.log_decay.shape)


class BlockInputs:
    """The inputs of one block, each read when first needed, and the products of its chunks."""

    def __init__(self, inputs: Inputs, block: Block) -> None:
        self.inputs, self.block = inputs, block

    @cached_property
    def q(self) -> Tensor:
        return self.block.take(self.inputs.q, self.inputs.dtype, self.inputs.groups) * self.inputs.scale

    @cached_property
    def k(self) -> Tensor:
        return self.block.take(self.inputs.k, self.inputs.dtype)

    @cached_property
    def v(self) -> Tensor:
        return self.block.take(self.inputs.v, self.inputs.dtype)

    @cached_property
    def d_out(self) -> Tensor:
        assert self.inputs.d_out is not None, "there is none in a forward pass"
        return self.block.take(self.inputs.d_out, self.inputs.dtype, self.inputs.groups)

    @cached_property
    def decay(self) -> Decay:
        return self.inputs.decay(self.block)

    @property
    def q_decayed(self) -> Tensor:
        """The queries as they read the state before the chunk."""
        return self.q * self.decay.from_start

    @cached_property
    def k_decayed(self) -> Tensor:
        """The keys as they write to the state after the chunk."""
        return self.k * self.decay.to_end

    def intra_chunk(self) -> Tensor:
        return scores(self.q, self.k, self.decay) @ self.v

    def intra_chunk_backward(self, decay_learns: bool) -> Gradients:
        """The gradients inside the chunks, in a block's shapes; that of the decay is the flow of `intra_chunk.py`."""
        s = scores(self.q, self.k, self.decay)
        d_v = s.mT @ self.d_out
        d_scores = self.d_out @ self.v.mT
        d_q, d_k, flow = scores_backward(self.q, self.k, self.decay, s, d_scores, decay_learns=decay_learns)
        return Gradients(d_q, d_k, d_v, flow)

    def scan(self, state: Tensor, given: States, *, reverse: bool = False) -> tuple[Tensor, Tensor, States]:
        """Scan S <- e^A S + U from chunk to chunk, from a `given` state or zero where a document opens.

        Returns the state before every chunk `[B, H, n, D_k, D_v]`, the one after the last, and those after the
        documents that end here. In reverse, the same of gradients: those of the states after every chunk, of the one
        before the first, and of initial states.
        """
        block = self.block
        if reverse:
            updates, order = self.q_decayed.mT @ self.d_out, range(block.size)[::-1]
            opens, closes = block.last, block.first
        else:
            updates, order = self.k_decayed.mT @ self.v, range(block.size)
            opens, closes = block.first, block.last
        received = torch.empty_like(updates)
        closed: States = {}
        places, added, kept = (x.unbind(2) for x in (received, updates, self.decay.total.expand_as(updates)))
        for c in order:
            if (document := opens[c]) is not None:
                state = given.get(document, torch.zeros_like(state))
            places[c].copy_(state)
            state = torch.addcmul(added[c], kept[c], state)
            if (document := closes[c]) is not None:
                closed[document] = state
        return received, state, closed

    def add_inter_chunk(self, d: Gradients, before: Tensor, d_after: Tensor) -> None:
        """Add to `d` what flows through the states before and after the chunks."""
        d_q = (self.d_out @ before.mT).mul_(self.decay.from_start)
        d_k = (self.v @ d_after.mT).mul_(self.decay.to_end)
        if d.log_decay is not None:
            by_query = (self.q * d_q).unflatten(-2, (self.block.chunk_size, -1)).sum(-2)
            through = (before * d_after).sum(-1).mul_(self.decay.total[..., 0]).unsqueeze(-2)
            d.log_decay = _decay_gradient(d.log_decay, by_query, self.k * d_k, through)
        d.q.add_(d_q)
        d.k.add_(d_k)
        add_product(d.v, self.k_decayed, d_after)


def add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x += a @ b, contiguous."""
    x.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))
    return x


def _decay_gradient(intra: Tensor, by_query: Tensor, by_key: Tensor, through: Tensor) -> Tensor:
    """The gradient of a token's log decay: the sum of everything that passes the token, from anything before it (the
    state before the chunk, a key) to anything from it on (a query, the state after the chunk).

    A difference like q dq - k dk would hold the same, but a token's own key and query, which no decay separates,
    would only cancel up to their rounding.
    """
    if intra.shape[-1] == 1:
        by_query, by_key, through = (x.sum(-1, keepdim=True) for x in (by_query, by_key, through))
    to_queries = (intra + by_query).flip(-2).cumsum(-2).flip(-2)
    to_state = F.pad(by_key[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)
    return to_queries + to_state + through
