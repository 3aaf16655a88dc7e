"""The kernels as custom ops, opaque to `torch.compile` and differentiable.

Custom ops return only tensors, so missing outputs are empty tensors.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..documents import document_boundaries
from ..local_passes import LocalDocuments, per_document
from .launch import decode, pad_head_dims
from .passes import TritonBackward, TritonForward
from .segments import segment_length


def triton_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *, scale: float, cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute `recurrent_linear_attention` with out in `dtype`."""
    inputs = (q, k, v, log_decay, initial_state)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if q.shape[1] == 1 and not learns:
        if cu_seqlens is not None and (len(q), len(cu_seqlens)) != (1, 2):
            raise ValueError(
                "cu_seqlens of one token must be [0, 1] in a batch of 1, got a batch of "
                f"{len(q)} and {len(cu_seqlens)} edges"
            )
        return _decode(*inputs, scale, dtype)
    key_dim, value_dim = k.shape[-1], v.shape[-1]
    k, v, log_decay = pad_head_dims(k, v, log_decay)
    missing = (0, v.shape[-1] - value_dim, 0, k.shape[-1] - key_dim)
    q = F.pad(q, missing[2:]) if missing[3] else q
    if initial_state is not None and any(missing):
        initial_state = F.pad(initial_state, missing)
    out, state, _ = _forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, dtype)
    return out[..., :value_dim], state[..., :key_dim, :value_dim] if output_final_state else None


@torch.library.custom_op("linear_llama3::decode", mutates_args=())
def _decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Decode one token: out `[B, 1, H * G, V]`, and the state after it `[B, H, K, V]`."""
    return decode(q, k, v, log_decay, state, scale=scale, dtype=dtype)


@_decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    after = k.new_empty(k.shape[0], *k.shape[2:], v.shape[3], dtype=torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype), after


# their tables come from the host: torch.compile keeps both out of CUDA graphs
@torch.library.custom_op("linear_llama3::linear_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, output_final_state: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out, the final state, and the states that enter the segments of longer documents."""
    documents = _documents(q, cu_seqlens)
    forward = TritonForward(k, v, log_decay, documents, out_dtype=dtype)
    entering = per_document(initial_state, batch=k.shape[0])
    out, final, (entering,) = forward.output(q, scale, entering, final_states=output_final_state)
    if entering is None and cu_seqlens is not None:
        entering = k.new_empty(1, 0, *k.shape[2:], v.shape[3], dtype=torch.float32)  # the number of dims when compiled
    return out, _present(final, k), _present(entering, k)


def _documents(q: Tensor, cu_seqlens: Tensor | None) -> LocalDocuments:
    return LocalDocuments.complete(document_boundaries(cu_seqlens, batch=q.shape[0], tokens=q.shape[1]))


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, output_final_state: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, tokens, heads, key_dim = k.shape
    state = (heads, key_dim, v.shape[3])
    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    final: tuple[Any, ...] = (documents, *state) if output_final_state else (0,)
    entering: tuple[Any, ...] = (0,)
    if cu_seqlens is not None:
        entering = (1, torch.library.get_ctx().new_dynamic_size(), *state)
    elif initial_state is not None or tokens > segment_length(k, v):
        entering = (batch, -(-tokens // segment_length(k, v)), *state)
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype)
    return out, k.new_empty(final, dtype=torch.float32), k.new_empty(entering, dtype=torch.float32)


@torch.library.custom_op(
    "linear_llama3::linear_attention_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, entering: Tensor,
    d_out: Tensor, d_final: Tensor | None, scale: float, decay_learns: bool, initial_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    residuals = (entering if entering.numel() else None,)
    backward = TritonBackward(
        q, k, v, log_decay, _documents(q, cu_seqlens), residuals, d_out, scale, decay_learns=decay_learns
    )
    d = backward.gradients(per_document(d_final, batch=k.shape[0]), initial_state=initial_learns)
    return d.q, d.k, d.v, _present(d.log_decay, k), _present(d.initial_state, k)


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, entering: Tensor,
    d_out: Tensor, d_final: Tensor | None, scale: float, decay_learns: bool, initial_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    documents = k.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    d_gate = k.new_empty(0, dtype=torch.float32) if not decay_learns or log_decay is None else _like(log_decay)
    d_initial = k.new_empty(
        (documents, k.shape[2], k.shape[3], v.shape[3]) if initial_learns else 0, dtype=torch.float32
    )
    return _like(q), _like(k), _like(v), d_gate, d_initial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, log_decay, initial_state, cu_seqlens, ctx.scale, _, _ = inputs
    ctx.save_for_backward(q, k, v, log_decay, cu_seqlens, output[2])
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:  # fmt: skip
    q, k, v, log_decay, cu_seqlens, entering = ctx.saved_tensors
    if d_out is None:
        d_out = q.new_zeros(*q.shape[:3], v.shape[3])
    decay_learns, initial_learns = ctx.needs_input_grad[3:5]
    dq, dk, dv, d_decay, d_initial = _backward(
        q, k, v, log_decay, cu_seqlens, entering, d_out, d_final, ctx.scale, decay_learns, initial_learns
    )
    d_initial = d_initial.to(ctx.initial_dtype) if initial_learns else None
    return dq, dk, dv, d_decay if decay_learns else None, d_initial, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _present(x: Tensor | None, like: Tensor) -> Tensor:
    """Replace None by an empty tensor, a new one each time: outputs of an op must not be the same tensor."""
    return like.new_empty(0, dtype=torch.float32) if x is None else x
