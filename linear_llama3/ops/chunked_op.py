"""The chunked form as an op that `torch.compile` passes over: traced through, its graph would grow with the sequence.

What is absent is told by tensors without elements: an op returns tensors only.
"""

from typing import Any

import torch
from torch import Tensor

from .chunked import run_backward, run_forward
from .chunks import chunks_of
from .precision import working_dtype


def compiled_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *, scale: float, boundaries: tuple[int, ...],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same contract as `recurrent_linear_attention`."""
    out, state, _ = _forward(q, k, v, log_decay, initial_state, list(boundaries), scale)
    return out, state


# where documents end is told from the host: torch.compile keeps both out of CUDA graphs
@torch.library.custom_op("linear_llama3::chunked", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, boundaries: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Out, the final states, and those at the left edges of the blocks."""
    chunks = chunks_of(q, k, tuple(boundaries))
    out, final, _, edges = run_forward(q, k, v, log_decay, initial_state, chunks, scale)
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
def _backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, edges: Tensor,
    d_out: Tensor | None, d_final: Tensor | None, boundaries: list[int], scale: float, gate: bool, initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    saved, chunks = (q, k, v, log_decay, initial_state, edges), chunks_of(q, k, tuple(boundaries))
    dq, dk, dv, *others = run_backward(saved, d_out, d_final, chunks, scale, gate=gate, initial=initial)
    d_gate, d_initial = (q.new_empty(0) if x is None else x for x in others)
    return dq, dk, dv, d_gate, d_initial


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, edges: Tensor,
    d_out: Tensor | None, d_final: Tensor | None, boundaries: list[int], scale: float, gate: bool, initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = ((log_decay, gate), (initial_state, initial))
    d_gate, d_initial = (x.new_empty(x.shape) if learns and x is not None else q.new_empty(0) for x, learns in given)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_gate, d_initial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *saved, ctx.boundaries, ctx.scale = inputs
    ctx.save_for_backward(*saved, output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gate, initial = ctx.needs_input_grad[3:5]
    dq, dk, dv, d_gate, d_initial = _backward(
        *ctx.saved_tensors, d_out, d_final, ctx.boundaries, ctx.scale, gate, initial
    )
    return dq, dk, dv, d_gate if gate else None, d_initial if initial else None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
