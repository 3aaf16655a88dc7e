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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .block_products import BlockGradients, BlockInputs, Inputs, add_product
from .local_passes import Gradients, LocalDocuments, Output, per_document
from .precision import without_autocast


def chunked_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    boundaries: tuple[int, ...],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `recurrent_linear_attention`, with the same arguments and results."""
    return _Chunked.apply(q, k, v, log_decay, initial_state, LocalDocuments.complete(boundaries), scale)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None,
        documents: LocalDocuments, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        entering = per_document(initial_state, batch=k.shape[0])
        out, final_states, residuals = ChunkedForward(k, v, log_decay, documents).output(q, scale, entering)
        ctx.save_for_backward(q, k, v, log_decay, *residuals)
        ctx.documents, ctx.scale = documents, scale
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        assert final_states is not None, "always computed"
        return out, final_states

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, *residuals = ctx.saved_tensors
        decay_learns, initial_learns = ctx.needs_input_grad[3:5]
        local = ChunkedBackward(
            q, k, v, log_decay, ctx.documents, residuals, d_out, ctx.scale, decay_learns=decay_learns
        )
        d = local.gradients(per_document(d_final, batch=k.shape[0]), initial_state=initial_learns)
        d_initial = None if d.initial_state is None else d.initial_state.to(ctx.initial_dtype)
        return d.q, d.k, d.v, d.log_decay, d_initial, None, None


class ChunkedForward:
    """The forward pass of one device's tokens; see `local_passes.py`."""

    def __init__(self, k: Tensor, v: Tensor, log_decay: Tensor | None, documents: LocalDocuments) -> None:
        self.k, self.v, self.log_decay, self.documents = k, v, log_decay, documents

    def summary(self) -> Tensor:
        inputs = Inputs(self.k, self.k, self.v, self.log_decay, self.documents)
        return torch.stack([self._document_state(inputs, document) for document in self.documents.closing])

    def _document_state(self, inputs: Inputs, document: int | None) -> Tensor:
        state = inputs.zero_state()
        for block in inputs.chunks.document(document).blocks if document is not None else ():
            _, state, _ = BlockInputs(inputs, block).scan_states(state, {})
        return state

    def intra_chunk(self, q: Tensor, scale: float) -> list[Tensor]:
        inputs = Inputs(q, self.k, self.v, self.log_decay, self.documents, scale)
        return [BlockInputs(inputs, block).intra_chunk() for block in inputs.chunks.blocks]

    def output(self, q: Tensor, scale: float, entering: Tensor | None, intra: list[Tensor] | None = None) -> Output:
        inputs = Inputs(q, self.k, self.v, self.log_decay, self.documents, scale)
        blocks, initial = inputs.chunks.blocks, inputs.by_document(entering, self.documents.opening)
        out = torch.empty(*q.shape[:3], self.v.shape[-1], dtype=inputs.dtype, device=q.device)
        state, final_states = inputs.zero_state(), {}
        edges = state.new_empty(len(blocks), *state.shape)  # the states at the left edges of the blocks
        for i, block in enumerate(blocks):
            x = BlockInputs(inputs, block)
            edges[i] = state
            before, state, ended = x.scan_states(state, initial)
            block_out = x.intra_chunk() if intra is None else intra[i]
            block.put(add_product(block_out, x.q_decayed, before), out, inputs.groups)
            final_states.update(ended)
        final = torch.cat([final_states[n] for n in range(inputs.chunks.documents)] or [state])
        return Output(out, final, (entering, edges))


class ChunkedBackward:
    """The backward pass of one device's tokens; see `local_passes.py`."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, documents: LocalDocuments,
        residuals: Sequence[Tensor | None], d_out: Tensor | None, scale: float, *, decay_learns: bool,
    ) -> None:  # fmt: skip
        if d_out is None:
            d_out = q.new_zeros(()).expand(*q.shape[:3], v.shape[-1])
        self.inputs = Inputs(q, k, v, log_decay, documents, scale, d_out)
        self.documents, self.decay_learns = documents, decay_learns
        self.entering, self.edges = residuals

    def summary(self) -> Tensor:
        return torch.stack([self._document_gradient(document) for document in self.documents.opening])

    def _document_gradient(self, document: int | None) -> Tensor:
        d_state = self.inputs.zero_state()
        for block in self.inputs.chunks.document(document).blocks[::-1] if document is not None else ():
            _, d_state, _ = BlockInputs(self.inputs, block).scan_gradients(d_state, {})
        return d_state

    def intra_chunk(self) -> list[BlockGradients]:
        blocks = self.inputs.chunks.blocks
        return [BlockInputs(self.inputs, block).intra_chunk_backward(self.decay_learns) for block in blocks]

    def gradients(
        self, d_leaving: Tensor | None, intra: list[BlockGradients] | None = None, *, initial_state: bool = False
    ) -> Gradients:
        inputs, blocks = self.inputs, self.inputs.chunks.blocks
        assert self.edges is not None, "saved by the forward pass"
        initial = inputs.by_document(self.entering, self.documents.opening)
        leaving = inputs.by_document(d_leaving, self.documents.closing)
        d_q, d_k, d_v = (torch.empty_like(x) for x in (inputs.q, inputs.k, inputs.v))
        d = Gradients(d_q, d_k, d_v, inputs.empty_decays() if self.decay_learns else None, None)
        d_state, d_initial = inputs.zero_state(), {}
        for i in reversed(range(len(blocks))):
            x = BlockInputs(inputs, blocks[i])
            before, _, _ = x.scan_states(self.edges[i], initial)
            d_after, d_state, began = x.scan_gradients(d_state, leaving)
            block_d = x.intra_chunk_backward(self.decay_learns) if intra is None else intra[i]
            x.add_inter_chunk(block_d, before, d_after)
            block_d.put(blocks[i], d, inputs)
            d_initial.update(began)
        if d.log_decay is not None:
            d.log_decay = inputs.like_decays(d.log_decay)
        if initial_state:
            d.initial_state = torch.cat([d_initial[n] for n in range(inputs.chunks.documents)])
        return d
