"""Causal linear attention as a custom op, opaque to `torch.compile`: a traced graph would grow with the sequence.

It runs the passes of `local_passes.py`, forward and backward, over sequences that lie on one device. Custom ops return
only tensors, so missing outputs are empty tensors.
"""

from typing import Any

import torch
from torch import Tensor

from .block_products import Inputs
from .chunked import ChunkedBackward, ChunkedForward
from .documents import document_boundaries
from .local_passes import BackwardPass, ForwardPass, LocalDocuments, per_document
from .precision import without_autocast, working_dtype


def causal_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *, scale: float, cu_seqlens: Tensor | None,
    initial_state: Tensor | None, output_final_state: bool, dtype: torch.dtype, backend: str = "chunked",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute `recurrent_linear_attention` by the backend "chunked" or "triton", with out in `dtype`."""
    out, state, _ = _forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, dtype, backend)
    return out, state if output_final_state else None


def passes(backend: str) -> tuple[type[ForwardPass], type[BackwardPass]]:
    """The implementation of the forward and of the backward pass."""
    if backend == "triton":
        from .triton.passes import TritonBackward, TritonForward

        return TritonForward, TritonBackward
    return ChunkedForward, ChunkedBackward


# the edges of documents are read on the host, so torch.compile must keep both ops out of CUDA graphs
@torch.library.custom_op("linear_llama3::linear_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, output_final_state: bool, dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out, the final states, and the states `[B, n, H, K, V]` that the backward pass starts from."""
    forward = passes(backend)[0](k, v, log_decay, _documents(q, cu_seqlens), out_dtype=dtype)
    entering = per_document(initial_state, batch=k.shape[0])
    out, final, (_, kept) = forward.output(q, scale, entering, final_states=output_final_state)
    kept = k.new_empty(k.shape[0], 0, *_state(k, v), dtype=working_dtype(q)) if kept is None else kept
    return out, _present(final, k), kept


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, output_final_state: bool, dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, tokens = k.shape[:2]
    if cu_seqlens is not None or not isinstance(tokens, int):
        kept: Any = torch.library.get_ctx().new_dynamic_size()
    elif backend == "chunked":
        kept = len(Inputs(q, k, v, log_decay, (0, tokens), scale).blocks)
    else:
        from .triton.segments import segment_length

        segments = -(-tokens // segment_length(k, v))
        kept = segments if initial_state is not None or segments > 1 else 0
    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    work = working_dtype(q)
    final = k.new_empty((documents, *_state(k, v)) if output_final_state else 0, dtype=work)
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype)
    return out, final, k.new_empty(batch, kept, *_state(k, v), dtype=work)


@torch.library.custom_op(
    "linear_llama3::linear_attention_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
@without_autocast
def _backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    kept: Tensor, d_out: Tensor, d_final: Tensor | None, scale: float, backend: str, decay_learns: bool,
    initial_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    entering = per_document(initial_state, batch=k.shape[0])
    residuals = entering, kept if kept.shape[1] else None
    backward = passes(backend)[1](
        q, k, v, log_decay, _documents(q, cu_seqlens), residuals, d_out, scale, decay_learns=decay_learns
    )
    d = backward.gradients(per_document(d_final, batch=k.shape[0]), initial_state=initial_learns)
    d_initial = d.initial_state
    if d_initial is not None and initial_state is not None:
        d_initial = d_initial.to(initial_state.dtype)
    return d.q, d.k, d.v, _present(d.log_decay, k), _present(d_initial, k)


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, decay_learns, initial_learns = others
    d_decay = _like(log_decay) if decay_learns and log_decay is not None else None
    d_initial = _like(initial_state) if initial_learns and initial_state is not None else None
    return _like(q), _like(k), _like(v), _present(d_decay, k), _present(d_initial, k)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *saved, ctx.scale, _, _, ctx.backend = inputs
    ctx.save_for_backward(*saved, output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, *others = ctx.saved_tensors  # gradient checkpointing allows one look
    d_out = q.new_zeros(*q.shape[:3], v.shape[3]) if d_out is None else d_out
    decay_learns, initial_learns = ctx.needs_input_grad[3:5]
    d_q, d_k, d_v, d_decay, d_initial = _backward(
        q, k, v, *others, d_out, d_final, ctx.scale, ctx.backend, decay_learns, initial_learns
    )
    gradients = d_q, d_k, d_v, d_decay if decay_learns else None, d_initial if initial_learns else None
    return *gradients, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _documents(q: Tensor, cu_seqlens: Tensor | None) -> LocalDocuments:
    return LocalDocuments.complete(document_boundaries(cu_seqlens, batch=q.shape[0], tokens=q.shape[1]))


def _state(k: Tensor, v: Tensor) -> tuple[int, int, int]:
    return k.shape[2], k.shape[3], v.shape[3]


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _present(x: Tensor | None, like: Tensor) -> Tensor:
    """Replace None by an empty tensor, a new one each time: outputs of an op must not be the same tensor."""
    return like.new_empty(0) if x is None else x
