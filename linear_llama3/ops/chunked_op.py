"""The chunked form as a custom op, opaque to `torch.compile`: a traced graph would grow with the sequence.

Custom ops return only tensors, so missing outputs are empty tensors.
"""

from typing import Any

import torch
from torch import Tensor

from .chunked import ChunkedBackward, ChunkedForward
from .local_passes import LocalDocuments, per_document
from .precision import without_autocast, working_dtype


def compiled_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *, scale: float, boundaries: tuple[int, ...],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `recurrent_linear_attention`, with the same arguments and results."""
    out, state, _ = _forward(q, k, v, log_decay, initial_state, list(boundaries), scale)
    return out, state


# the edges of documents are read on the host, so torch.compile must keep both ops out of CUDA graphs
@torch.library.custom_op("linear_llama3::chunked", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, boundaries: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out, the final states, and the states at the left edges of the blocks."""
    documents = LocalDocuments.complete(tuple(boundaries))
    entering = per_document(initial_state, batch=k.shape[0])
    out, final, (_, edges) = ChunkedForward(k, v, log_decay, documents).output(q, scale, entering)
    assert final is not None and edges is not None
    return out, final, edges


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, boundaries: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, _, heads, key_dim = k.shape
    state, dtype = (heads, key_dim, v.shape[3]), working_dtype(q)
    blocks = torch.library.get_ctx().new_dynamic_size()
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype)
    final = q.new_empty(batch * (len(boundaries) - 1), *state, dtype=dtype)
    return out, final, q.new_empty(blocks, batch, *state, dtype=dtype)


@torch.library.custom_op("linear_llama3::chunked_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
@without_autocast
def _backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, edges: Tensor,
    d_out: Tensor | None, d_final: Tensor | None, boundaries: list[int], scale: float, decay_learns: bool,
    initial_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    documents = LocalDocuments.complete(tuple(boundaries))
    residuals = per_document(initial_state, batch=k.shape[0]), edges
    local = ChunkedBackward(q, k, v, log_decay, documents, residuals, d_out, scale, decay_learns=decay_learns)
    d = local.gradients(per_document(d_final, batch=k.shape[0]), initial_state=initial_learns)
    d_log_decay = q.new_empty(0) if d.log_decay is None else d.log_decay
    if d.initial_state is None or initial_state is None:
        return d.q, d.k, d.v, d_log_decay, q.new_empty(0)
    return d.q, d.k, d.v, d_log_decay, d.initial_state.to(initial_state.dtype)


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, edges: Tensor,
    d_out: Tensor | None, d_final: Tensor | None, boundaries: list[int], scale: float, decay_learns: bool,
    initial_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_log_decay, d_initial = (
        x.new_empty(x.shape) if learns and x is not None else q.new_empty(0)
        for x, learns in ((log_decay, decay_learns), (initial_state, initial_learns))
    )
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_log_decay, d_initial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *saved, ctx.boundaries, ctx.scale = inputs
    ctx.save_for_backward(*saved, output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    decay_learns, initial_learns = ctx.needs_input_grad[3:5]
    dq, dk, dv, d_log_decay, d_initial = _backward(
        *ctx.saved_tensors, d_out, d_final, ctx.boundaries, ctx.scale, decay_learns, initial_learns
    )
    return dq, dk, dv, d_log_decay if decay_learns else None, d_initial if initial_learns else None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
