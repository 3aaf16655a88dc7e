"""Checks of arguments that the public ops share. Each raises ValueError with the rule, the value and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import check_backend


def check_arguments(q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None, causal: bool, backend: str) -> None:
    """Check the arguments of linear attention, on one device or of a shard."""
    check_backend(backend)
    check_shapes(q, k, v)
    if log_decay is None:
        return
    if not causal:
        raise ValueError("causal=False allows no decay, got log_decay; pass log_decay=None or causal=True")
    shapes = (k.shape[2:3], k.shape[:3], k.shape)
    if log_decay.shape not in shapes:
        raise ValueError(
            "log_decay must be [H_kv], [B, T, H_kv] or [B, T, H_kv, D_k], here one of "
            f"{tuple(map(tuple, shapes))}, got {tuple(log_decay.shape)}"
        )
    # on a GPU the check would wait for the device in every call
    readable = log_decay.device.type == "cpu" and not torch.compiler.is_compiling()
    if log_decay.dim() == 1 and readable and bool((log_decay > 0).any()):
        raise ValueError(
            f"a constant log_decay must be <= 0 (a natural logarithm), got {log_decay.max().item():.4g}; "
            "pass the log of a factor in (0, 1]"
        )


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check the shapes and dtypes of linear and softmax attention."""
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


def check_initial_state(state: Tensor | None, q: Tensor, v: Tensor, documents: int | None, *, normalize: bool) -> None:
    """Check the shape of an initial state. `documents`: the number packed, None for plain rows."""
    if state is None:
        return
    rows = q.shape[0] if documents is None else documents
    expected = (rows, v.shape[2], q.shape[-1], v.shape[-1] + normalize)
    if tuple(state.shape) != expected:
        raise ValueError(
            f"initial_state must be {'[B, ' if documents is None else '[N, '}H_kv, D_k, D_v"
            f"{' + 1' if normalize else ''}] = {expected}, got {tuple(state.shape)}"
        )
