"""The public op: checks its arguments, picks a backend.

    S_t = e^{g_t} * S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        (the token itself included)

`g` is the log decay: none, one constant per head (Lightning, Retention), one value per token and head, or one
value per token, head and key channel (GLA).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends import choose_backend
from .bidirectional import bidirectional_linear_attention
from .causal_op import causal_linear_attention
from .checks import check_arguments, check_initial_state
from .documents import check_cu_seqlens, document_boundaries, drop_empty, read_cu_seqlens
from .precision import without_autocast, working_dtype
from .recurrent import recurrent_linear_attention


@without_autocast
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Linear attention over complete sequences on one device.

    Args:
        q: queries `[B, T, H_q, D_k]`.
        k: keys `[B, T, H_kv, D_k]`, H_q a multiple of H_kv; the state belongs to the kv head.
        v: values `[B, T, H_kv, D_v]`.
        log_decay: natural log, <= 0. None, `[H_kv]`, `[B, T, H_kv]` or `[B, T, H_kv, D_k]`.
        scale: applied to q. Default: `D_k ** -0.5`.
        normalize: divide by `q . sum(k)`, exactly and without an epsilon (a sum of 0 gives 0). The state then has
            D_v + 1 columns, the last one the normalizer.
        initial_state: `[B, H_kv, D_k, D_v]`, with `cu_seqlens` one per document, `[N, H_kv, D_k, D_v]`.
        output_final_state: return the state after the last token (of every document).
        cu_seqlens: int `[N + 1]`, edges of the documents packed in a batch of 1; the state restarts at each. A
            document without tokens keeps its initial state (0 without `initial_state`).
        causal: False lets every token see all tokens of its document; no decay is possible then.
        backend: "recurrent" (the definition, token after token), "chunked" (PyTorch, any device), "triton" (kernels
            for NVIDIA GPUs), or "auto": Triton on CUDA; elsewhere chunked, recurrent for one token (a decoding step).

    Returns:
        out `[B, T, H_q, D_v]` in the dtype of v, and the final state in float32 (float64 for float64 inputs) or None.

    Raises:
        ValueError: arguments that do not fit together.
    """
    check_arguments(q, k, v, log_decay=log_decay, causal=causal, backend=backend)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens)
    documents = None if cu_seqlens is None else len(cu_seqlens) - 1
    check_initial_state(initial_state, q, v, documents, normalize=normalize)
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        edges = read_cu_seqlens(cu_seqlens)
        if len(drop_empty(edges)) < len(edges):
            return _without_empty(
                q, k, v, edges, initial_state, log_decay=log_decay, scale=scale, normalize=normalize, causal=causal,
                output_final_state=output_final_state, cu_seqlens=cu_seqlens, backend=backend,
            )  # fmt: skip
    backend = choose_backend(backend, k, causal=causal)
    log_decay = upcast_constant_decay(log_decay, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    values = with_ones_column(v) if normalize else v

    if causal and backend != "recurrent":
        attend: Callable[..., tuple[Tensor, Tensor | None]] = causal_linear_attention
        if backend == "triton":
            from .triton.op import triton_linear_attention

            attend = triton_linear_attention
        out, state = attend(
            q, k, values, log_decay, scale=scale, cu_seqlens=cu_seqlens, initial_state=initial_state,
            output_final_state=output_final_state, dtype=working_dtype(q) if normalize else v.dtype,
        )  # fmt: skip
    else:
        boundaries = document_boundaries(cu_seqlens, batch=q.shape[0], tokens=q.shape[1])
        attend = bidirectional_linear_attention
        if causal:
            attend = functools.partial(recurrent_linear_attention, log_decay=log_decay)
        out, state = attend(q, k, values, scale=scale, boundaries=boundaries, initial_state=initial_state)
    out = divide_by_normalizer(out) if normalize else out
    return out.to(v.dtype), state if output_final_state else None


def _without_empty(
    q: Tensor, k: Tensor, v: Tensor, edges: tuple[int, ...], initial_state: Tensor | None, *, cu_seqlens: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Run `linear_attention` on the documents that have tokens; empty ones keep their initial state."""
    kept = torch.tensor([n for n, (a, b) in enumerate(itertools.pairwise(edges)) if a != b], device=q.device)
    out, state = linear_attention(
        q, k, v, cu_seqlens=cu_seqlens.unique_consecutive(),
        initial_state=None if initial_state is None else initial_state[kept], **options,
    )  # fmt: skip
    if state is None:
        return out, None
    before = state.new_zeros(len(edges) - 1, *state.shape[1:]) if initial_state is None else initial_state.to(state)
    return out, before.index_copy(0, kept, state)


def upcast_constant_decay(log_decay: Tensor | None, k: Tensor) -> Tensor | None:
    """Upcast a constant log decay `[H_kv]` to at least float32, because its gradient sums over all tokens."""
    return log_decay if log_decay is None or log_decay.dim() > 1 else log_decay.to(working_dtype(k))


def with_ones_column(v: Tensor) -> Tensor:
    """Append a column of ones: the extra column of the state is the normalizer, sum(k)."""
    return F.pad(v, (0, 1), value=1.0)


def divide_by_normalizer(out: Tensor) -> Tensor:
    """Divide by the last column; 0 for a token that sees nothing, such as padding before a sequence."""
    weight = out[..., -1:]
    return out[..., :-1] / weight.masked_fill(weight == 0, 1.0)
