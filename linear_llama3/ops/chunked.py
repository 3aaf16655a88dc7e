"""Linear attention in chunks: matrix products inside a chunk, the recurrence only from chunk to chunk.

Plain PyTorch on any device. With b the log decay summed from the start of a chunk of C tokens, token i reads earlier
tokens of its chunk (intra-chunk) and the state S before the chunk (inter-chunk):

    o_i = sum_{j <= i} (q_i . e^{b_i - b_j} k_j) v_j  +  (e^{b_i} q_i)^T S
    S  <- e^{b_C} S + sum_j e^{b_C - b_j} k_j v_j^T

The backward pass is written by hand (arXiv 2502.07563 with decay folded in; 2312.06635 for gates). It works block by
block and recomputes the states of a block from the one saved at its left edge, so memory is linear in T with a small
constant. Every exponent is a difference of cumulated log decays and <= 0: nothing overflows, and no prefix products
are divided.

This file holds the loops over blocks; `block_products.py` has the products inside one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block_products import BlockInputs, Inputs, States, add_product
from .local_passes import Documents, Gradients, LocalDocuments, Output, Residuals


class ChunkedForward:
    """The forward pass of one device's tokens; see `local_passes.py`."""

    def __init__(
        self, k: Tensor, v: Tensor, log_decay: Tensor | None, documents: LocalDocuments, *, out_dtype: torch.dtype
    ) -> None:
        self.k, self.v, self.log_decay, self.documents, self.out_dtype = k, v, log_decay, documents, out_dtype

    def summary(self) -> Tensor:
        return _accumulated(self._inputs(self.k, 1.0), self.documents.closing)

    def intra_chunk(self, q: Tensor, scale: float) -> list[Tensor]:
        inputs = self._inputs(q, scale)
        return [BlockInputs(inputs, block).intra_chunk() for block in inputs.blocks]

    def output(
        self, q: Tensor, scale: float, entering: Tensor | None, intra: list[Tensor] | None = None, *,
        final_states: bool = False,
    ) -> Output:  # fmt: skip
        inputs = self._inputs(q, scale)
        initial = inputs.by_document(entering, self.documents.opening)
        out = q.new_empty(*q.shape[:3], self.v.shape[-1], dtype=self.out_dtype)
        state = inputs.zero_state()
        final: States = {}
        edges = state.new_empty(len(state), len(inputs.blocks), *state.shape[1:])  # the states before the blocks
        for i, block in enumerate(inputs.blocks):
            x = BlockInputs(inputs, block)
            edges[:, i] = state
            before, state, ended = x.scan(state, initial)
            block_out = x.intra_chunk() if intra is None else intra[i]
            block.put(add_product(block_out, x.q_decayed, before), out, inputs.groups)
            final |= ended
        return Output(out, _by_row(final) if final_states else None, (entering, edges))

    def _inputs(self, q: Tensor, scale: float) -> Inputs:
        return Inputs(q, self.k, self.v, self.log_decay, self.documents.boundaries, scale)


class ChunkedBackward:
    """The backward pass of one device's tokens; see `local_passes.py`."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, documents: LocalDocuments,
        residuals: Residuals, d_out: Tensor, scale: float, *, decay_learns: bool,
    ) -> None:  # fmt: skip
        self.inputs = Inputs(q, k, v, log_decay, documents.boundaries, scale, d_out)
        self.documents, self.decay_learns = documents, decay_learns
        self.entering, self.edges = residuals

    def summary(self) -> Tensor:
        return _accumulated(self.inputs, self.documents.opening, reverse=True)

    def intra_chunk(self) -> list[Gradients]:
        blocks = self.inputs.blocks
        return [BlockInputs(self.inputs, block).intra_chunk_backward(self.decay_learns) for block in blocks]

    def gradients(
        self, d_leaving: Tensor | None, intra: list[Gradients] | None = None, *, initial_state: bool = False
    ) -> Gradients:
        inputs, blocks = self.inputs, self.inputs.blocks
        assert self.edges is not None, "saved by the forward pass"
        initial = inputs.by_document(self.entering, self.documents.opening)
        leaving = inputs.by_document(d_leaving, self.documents.closing)
        d_q, d_k, d_v = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (inputs.q, inputs.k, inputs.v)
        )
        d_decay = inputs.empty_decays() if self.decay_learns else None
        d_state = inputs.zero_state()
        d_initial: States = {}
        for i in reversed(range(len(blocks))):
            x, block = BlockInputs(inputs, blocks[i]), blocks[i]
            before, _, _ = x.scan(self.edges[:, i], initial)
            d_after, d_state, began = x.scan(d_state, leaving, reverse=True)
            d = x.intra_chunk_backward(self.decay_learns) if intra is None else intra[i]
            x.add_inter_chunk(d, before, d_after)
            block.put(d.q.mul_(inputs.scale), d_q, inputs.groups)
            block.put(d.k, d_k)
            block.put(d.v, d_v)
            if d_decay is not None and d.log_decay is not None:
                block.put(d.log_decay, d_decay)
            d_initial |= began
        d_decay = None if d_decay is None else inputs.like_decays(d_decay)
        return Gradients(d_q, d_k, d_v, d_decay, _by_row(d_initial) if initial_state else None)


def _accumulated(inputs: Inputs, documents: Documents, *, reverse: bool = False) -> Tensor:
    """The states `[n, B, H, D_k, D_v]` that these documents accumulate from zero; in reverse, the gradients."""
    states = []
    for document in documents:
        state = inputs.zero_state()
        for block in inputs.blocks_of(document)[:: -1 if reverse else 1]:
            _, state, _ = BlockInputs(inputs, block).scan(state, {}, reverse=reverse)
        states.append(state)
    return torch.stack(states)


def _by_row(states: States) -> Tensor:
    """The states of all documents, `[B or N, H, D_k, D_v]`."""
    return torch.cat([states[n] for n in range(len(states))])
