"""The public op: checks its arguments, picks a backend.

    S_t = e^{g_t} * S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        (the token itself included)

`g` is the log decay: none, one constant per head (Lightning, Retention), one value per token and head, or one
value per token, head and key channel (GLA).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .bidirectional import bidirectional_linear_attention
from .chunked import chunked_linear_attention
from .precision import without_autocast, working_dtype
from .recurrent import recurrent_linear_attention

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "recurrent": recurrent_linear_attention,
    "chunked": chunked_linear_attention,
}


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
    """Linear attention over whole sequences on one device.

    Args:
        q: queries `[B, T, H_q, D_k]`.
        k: keys `[B, T, H_kv, D_k]`, H_q a multiple of H_kv; the state belongs to the kv head.
        v: values `[B, T, H_kv, D_v]`.
        log_decay: natural log, <= 0. None, `[H_kv]`, `[B, T, H_kv]` or `[B, T, H_kv, D_k]`.
        scale: applied to q. Default: `D_k ** -0.5`.
        normalize: divide by `q . sum(k)`, exactly and without an epsilon. The state then has D_v + 1 columns,
            the last one the normaliser.
        initial_state: `[B, H_kv, D_k, D_v]`, with `cu_seqlens` one per document, `[N, H_kv, D_k, D_v]`.
        output_final_state: return the state after the last token (of every document).
        cu_seqlens: int `[N + 1]`, edges of the documents packed in a batch of 1; the state restarts at each.
        causal: False lets every token see all tokens of its document; no decay is possible then.
        backend: "recurrent" (the definition, token after token), "chunked", or "auto": recurrent for one token
            (a decoding step), chunked otherwise.

    Returns:
        out `[B, T, H_q, D_v]` in the dtype of v, and the final state in float32 (float64 for float64 inputs) or None.

    Raises:
        ValueError: arguments that do not fit together.
    """
    log_decay, boundaries = check_arguments(
        q, k, v, log_decay=log_decay, cu_seqlens=cu_seqlens, causal=causal, backend=backend
    )
    check_initial_state(initial_state, q, v, boundaries, packed=cu_seqlens is not None, normalize=normalize)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    values = with_ones_column(v) if normalize else v

    if not causal:
        out, state = bidirectional_linear_attention(
            q, k, values, scale=scale, boundaries=boundaries, initial_state=initial_state
        )
    else:
        if backend == "auto":
            backend = "recurrent" if q.shape[1] == 1 else "chunked"
        out, state = BACKENDS[backend](
            q, k, values, log_decay, scale=scale, boundaries=boundaries, initial_state=initial_state
        )
    out = divide_by_normalizer(out) if normalize else out
    return out.to(v.dtype), state if output_final_state else None


def with_ones_column(v: Tensor) -> Tensor:
    """`[v, 1]`: the extra column of the state is the normaliser, sum(k)."""
    return F.pad(v, (0, 1), value=1.0)


def divide_by_normalizer(out: Tensor) -> Tensor:
    return out[..., :-1] / out[..., -1:]


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    backend: str,
) -> tuple[Tensor | None, tuple[int, ...]]:
    """Checks what one device and a shard have in common.

    Returns the log decay, a constant one in the working precision, and the document edges (0, ..., T).
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    check_shapes(q, k, v)
    batch, tokens, kv_heads, key_dim = k.shape
    if log_decay is not None:
        if not causal:
            raise ValueError("causal=False allows no decay, got log_decay; pass log_decay=None or causal=True")
        shapes = ((kv_heads,), (batch, tokens, kv_heads), (batch, tokens, kv_heads, key_dim))
        if tuple(log_decay.shape) not in shapes:
            raise ValueError(
                f"log_decay must be [H_kv], [B, T, H_kv] or [B, T, H_kv, D_k], here one of {shapes}, "
                f"got {tuple(log_decay.shape)}"
            )
        if log_decay.dim() == 1:
            if not (log_decay.is_meta or torch.compiler.is_compiling()) and bool((log_decay > 0).any()):
                raise ValueError(
                    f"a constant log_decay must be <= 0 (a natural logarithm), got {log_decay.max().item():.4g}; "
                    "pass the log of a factor in (0, 1]"
                )
            # not in half precision: its gradient is a sum over all tokens
            log_decay = log_decay.to(working_dtype(q))
    if cu_seqlens is None:
        return log_decay, (0, tokens)
    edges = read_cu_seqlens(cu_seqlens)
    check_edges(edges, batch=batch, tokens=tokens)
    return log_decay, edges


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The rules that linear and softmax attention share."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, T, H, D], got shape {tuple(x.shape)}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "q [B, T, H_q, D_k], k [B, T, H_kv, D_k] and v [B, T, H_kv, D_v] must agree in B, T, H_kv and D_k, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.shape[1] == 0:
        raise ValueError("a sequence needs at least one token, got T = 0")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"H_q must be a multiple of H_kv, got H_q = {q.shape[2]} and H_kv = {k.shape[2]}; "
            "every kv head serves the same number of query heads"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k and v must share a floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def read_cu_seqlens(cu_seqlens: Tensor) -> tuple[int, ...]:
    """As a tuple of ints: waits for the device."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be a 1-D integer tensor [N + 1], got a {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must be a 1-D integer tensor [N + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    return tuple(cu_seqlens.tolist())


def check_edges(edges: tuple[int, ...], *, batch: int, tokens: int) -> None:
    """Whether these are the document edges of a whole sequence."""
    if batch != 1:
        raise ValueError(
            f"cu_seqlens packs documents in a batch of 1, got a batch of {batch}; "
            "flatten the rows into one and shift their edges"
        )
    if edges[0] != 0 or edges[-1] != tokens or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"cu_seqlens must start at 0, increase, and end at T = {tokens}, the tokens of the whole sequence (its "
            f"`length`, where one is given), got {edges[:8]}{'...' if len(edges) > 8 else ''} ending at {edges[-1]}; "
            "drop empty documents"
        )


def check_initial_state(
    state: Tensor | None, q: Tensor, v: Tensor, boundaries: tuple[int, ...], *, packed: bool, normalize: bool
) -> None:
    if state is None:
        return
    rows = len(boundaries) - 1 if packed else q.shape[0]
    expected = (rows, v.shape[2], q.shape[-1], v.shape[-1] + normalize)
    if tuple(state.shape) != expected:
        raise ValueError(
            f"initial_state must be {'[N, ' if packed else '[B, '}H_kv, D_k, D_v{' + 1' if normalize else ''}] = "
            f"{expected}, got {tuple(state.shape)}"
        )
