"""Linear attention on the kernels: head dims are padded, and a decoding step is one launch, a custom op."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..causal_op import causal_linear_attention
from .launch import decode, pad_head_dims


def triton_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *, scale: float, cu_seqlens: Tensor | None,
    initial_state: Tensor | None, dtype: torch.dtype, **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute `causal_linear_attention`, with the same arguments and results."""
    inputs = (q, k, v, log_decay, initial_state)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if q.shape[1] == 1 and cu_seqlens is None and not learns:
        return _decode(*inputs, scale, dtype)
    key_dim, value_dim = k.shape[-1], v.shape[-1]
    k, v, log_decay = pad_head_dims(k, v, log_decay)
    missing = (0, v.shape[-1] - value_dim, 0, k.shape[-1] - key_dim)
    q = F.pad(q, missing[2:]) if missing[3] else q
    if initial_state is not None and any(missing):
        initial_state = F.pad(initial_state, missing)
    out, state = causal_linear_attention(
        q, k, v, log_decay, scale=scale, cu_seqlens=cu_seqlens, initial_state=initial_state, dtype=dtype,
        backend="triton", **options,
    )  # fmt: skip
    return out[..., :value_dim], None if state is None else state[..., :key_dim, :value_dim]


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
