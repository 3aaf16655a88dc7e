"""Attention of one tile, and its backward from a global lse: torch's fused operators, and scores in plain PyTorch.

The fused operators are reached by their aten names, because torch's public attention returns no lse. Shapes here are
theirs: q `[B, H_q, T_q, D]`, k `[B, H_kv, T_k, D]`, v `[B, H_kv, T_k, D_v]`, lse `[B, H_q, T_q]`, -inf where a row
sees no key.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .precision import working_dtype
from .visibility import Tile

SCORE_ROWS = 256  # query rows at once where the scores are formed, T_q x T_k, for want of a fused operator
FLASH_HEAD_DIM = 256  # the widest head of the CUDA flash operator
FLASH_CAPABILITY = (8, 0)  # and the oldest GPU that it runs on


def operand_dtype(q: Tensor, v: Tensor) -> torch.dtype:
    """The dtype that a tile is computed in: the CUDA operator reads half precision, the others work in float32."""
    return q.dtype if _flash_on_cuda(q, v) else working_dtype(q)


def split_for_kernel(tile: Tile, q: Tensor, v: Tensor) -> Iterator[Tile]:
    """Split the tile where its scores are formed."""
    if _flash_on_cpu(q, v) or (_flash_on_cuda(q, v) and tile.window is None):
        yield tile
    else:
        yield from tile.split(SCORE_ROWS)


def attend(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
    """Compute out `[B, H_q, T_q, D_v]` and lse."""
    q, k, v = (_dense(x) for x in (q, k, v))
    if _flash_on_cpu(q, v):
        hidden = tile.hidden(q.device)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, tile.causal, attn_mask=_bias(hidden, q.dtype), scale=scale
        )
        if hidden is not None:  # the operator reports lse 0 for a row without a visible key
            lse = lse.masked_fill(hidden.all(-1), -torch.inf)
        return out, lse
    if _flash_on_cuda(q, v) and tile.window is None:
        # causal tiles are squares: whether a kernel aligns the mask at the top or the bottom is the same
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, tile.causal, scale=scale)[:2]
    s = _scores(q, k, tile, scale)
    lse = s.logsumexp(-1)
    p = (s - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    return (p @ v.to(p.dtype).unsqueeze(2)).flatten(1, 2), lse.flatten(1, 2)


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, tile: Tile, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv of the tile, from the out and lse over all keys."""
    q, k, v, out, d_out = (_dense(x) for x in (q, k, v, out, d_out))
    if _flash_on_cpu(q, v):
        bias = _bias(tile.hidden(q.device), q.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, tile.causal, attn_mask=bias, scale=scale
        )
    if _flash_on_cuda(q, v) and tile.window is None:
        unused = torch.empty(2, dtype=torch.int64, device=q.device)  # the state of a dropout that does not happen
        d_out, out, lse = d_out.to(q.dtype).contiguous(), out.to(q.dtype).contiguous(), lse.contiguous()
        sizes = (None, None, q.shape[2], k.shape[2])
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            d_out, q, k, v, out, lse, *sizes, 0.0, tile.causal, unused, unused, scale=scale
        )
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row that sees no key: inf keeps exp(s - lse) at 0
    work, heads = working_dtype(q), k.shape[1]
    delta = (d_out * out).sum(-1)
    q_g, d_out_g, lse_g, delta_g = (x.to(work).unflatten(1, (heads, -1)) for x in (q, d_out, lse, delta))
    k_g, v_g = (x.to(work).unsqueeze(2) for x in (k, v))
    p = (_scores(q, k, tile, scale) - lse_g.unsqueeze(-1)).exp()
    d_s = scale * p * (d_out_g @ v_g.mT - delta_g.unsqueeze(-1))
    return (d_s @ k_g).flatten(1, 2), (d_s.mT @ q_g).sum(2), (p.mT @ d_out_g).sum(2)


def _dense(x: Tensor) -> Tensor:
    """The fused operators read the last dim as dense, whatever its stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _flash_on_cpu(q: Tensor, v: Tensor) -> bool:
    """torch's CPU flash operator refuses D_v != D."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def fits_flash(q: Tensor, v: Tensor) -> bool:
    """torch's CUDA flash operator takes half precision and D_v = D, a multiple of 8."""
    dim = q.shape[-1]
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and dim == v.shape[-1] and dim % 8 == 0 and dim <= FLASH_HEAD_DIM


def _flash_on_cuda(q: Tensor, v: Tensor) -> bool:
    """On NVIDIA's Ampere or newer."""
    if q.device.type != "cuda" or not fits_flash(q, v):
        return False
    # ROCm calls its devices cuda as well, with another operator under the same name
    return torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= FLASH_CAPABILITY


def _scores(q: Tensor, k: Tensor, tile: Tile, scale: float) -> Tensor:
    """`[B, H_kv, G, T_q, T_k]` in the working precision."""
    work = working_dtype(q)
    return tile.mask(scale * (q.to(work).unflatten(1, (k.shape[1], -1)) @ k.to(work).unsqueeze(2).mT))


def _bias(hidden: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The CPU operator wants a float mask."""
    return None if hidden is None else torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
