"""Softmax attention of a block of queries with blocks of keys: (out, lse), and the backward from a global lse.

A block holds the tokens of some spans of one global sequence, one after another. Partial results merge by their
log-sum-exp (arXiv 2310.01889, section 3, in its overflow-safe form); gradients of pairs of blocks only add up.

q `[B, T_q, H_q, D]`, k `[B, T_k, H_kv, D]`, v `[B, T_k, H_kv, D_v]`; out in float32 (float64 for float64 inputs),
lse `[B, H_q, T_q]`, -inf where a query has seen no key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_kernels import attend, attend_backward, operand_dtype, split_for_kernel
from .precision import without_autocast, working_dtype
from .visibility import Span, Tile, Visibility


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, visibility: Visibility) -> Tensor:
    """Attention of complete sequences on one device; out `[B, T, H_q, D_v]` in the working precision."""
    return _SoftmaxAttention.apply(q, k, v, scale, visibility)


class _SoftmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, visibility: Visibility) -> Tensor:
        spans = [(0, q.shape[1])]
        block = BlockAttention(q, spans, value_dim=v.shape[-1], scale=scale, visibility=visibility)
        block.add(k, v, spans)
        out, lse = block.result()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.visibility = scale, visibility
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        spans = [(0, q.shape[1])]
        block = BlockAttentionBackward(q, spans, out, lse, d_out, scale=ctx.scale, visibility=ctx.visibility)
        d_k, d_v = out.new_zeros(k.shape), out.new_zeros(v.shape)
        block.add(k, v, spans, d_k, d_v)
        return block.result().to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None


class BlockAttention:
    """Accumulates out and lse of one block of queries over any number of blocks of keys."""

    def __init__(
        self, q: Tensor, spans: Sequence[Span], *, value_dim: int, scale: float, visibility: Visibility
    ) -> None:
        self.spans, self.scale, self.visibility = spans, scale, visibility
        self.q = q.transpose(1, 2)  # [B, H_q, T_q, D]
        self.out = self.q.new_zeros(*self.q.shape[:3], value_dim, dtype=working_dtype(q))
        self.lse = self.out.new_full(self.q.shape[:3], -torch.inf)

    def add(self, k: Tensor, v: Tensor, spans: Sequence[Span]) -> None:
        """Attend to the keys and values at `spans` as well."""
        for tile, rows, _, operands in _tiles(self, k, v, spans):
            out, lse = attend(*operands, tile, self.scale)
            _merge(self.out[:, :, rows], self.lse[:, :, rows], out, lse)

    def merge(self, out: Tensor, lse: Tensor, rows: slice) -> None:
        """Add attention to further keys that was computed elsewhere: `[B, n, H_q, D_v]` and `[B, H_q, n]`."""
        _merge(self.out[:, :, rows], self.lse[:, :, rows], out.transpose(1, 2), lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """out `[B, T_q, H_q, D_v]` and lse `[B, H_q, T_q]`."""
        return self.out.transpose(1, 2), self.lse


class BlockAttentionBackward:
    """The gradients of the block, from the global out and lse."""

    def __init__(
        self,
        q: Tensor,
        spans: Sequence[Span],
        out: Tensor,
        lse: Tensor,
        d_out: Tensor,
        *,
        scale: float,
        visibility: Visibility,
    ) -> None:
        self.spans, self.scale, self.visibility = spans, scale, visibility
        self.work = working_dtype(q)
        self.q, self.out, self.d_out = q.transpose(1, 2), *(x.to(self.work).transpose(1, 2) for x in (out, d_out))
        self.lse = lse
        self.d_q = torch.zeros_like(self.q, dtype=self.work)

    def add(self, k: Tensor, v: Tensor, spans: Sequence[Span], d_k: Tensor, d_v: Tensor) -> None:
        """Add to the gradients of these keys and values, `d_k` and `d_v` shaped like them, in working precision."""
        d_k, d_v = d_k.transpose(1, 2), d_v.transpose(1, 2)
        for tile, rows, columns, operands in _tiles(self, k, v, spans):
            out, lse, d_out = (x[:, :, rows] for x in (self.out, self.lse, self.d_out))
            d_query, d_key, d_value = attend_backward(*operands, out, lse, d_out, tile, self.scale)
            self.d_q[:, :, rows] += d_query
            d_k[:, :, columns] += d_key
            d_v[:, :, columns] += d_value

    def result(self) -> Tensor:
        """The gradient of the queries `[B, T_q, H_q, D]`."""
        return self.d_q.transpose(1, 2)


def output_with_delta(d_out: Tensor, delta: Tensor) -> Tensor:
    """Return an out with rowsum(d_out * out) = delta, which is all that a backward pass reads of out.

    For a rank that receives delta `[..., n]` instead of out, shaped like `d_out` `[..., n, D_v]`. The value goes where
    |d_out| is largest, so that it is no larger than the sum of the true out's magnitudes.
    """
    index = d_out.abs().argmax(-1, keepdim=True)
    largest = d_out.gather(-1, index)
    value = torch.where(largest == 0, 0, delta.unsqueeze(-1) / largest)
    return torch.zeros_like(d_out).scatter_(-1, index, value)


def _tiles(
    block: BlockAttention | BlockAttentionBackward, k: Tensor, v: Tensor, spans: Sequence[Span]
) -> Iterator[tuple[Tile, slice, slice, tuple[Tensor, Tensor, Tensor]]]:
    """The tiles of the block with keys at these spans: their rows and columns, and their q, k and v `[B, H, n, D]`."""
    dtype = operand_dtype(block.q, v)
    q, k, v = block.q.to(dtype), k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)
    for full, row, column in block.visibility.tiles_of_blocks(block.spans, spans):
        for tile in split_for_kernel(full, q, v):
            rows, columns = tile.slices(row, column)
            yield tile, rows, columns, (q[:, :, rows], k[:, :, columns], v[:, :, columns])


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Add the attention over further keys, in place."""
    total = torch.logaddexp(lse, other_lse)
    shift = total.masked_fill(total == -torch.inf, 0)  # no key seen so far: weights 0, not nan
    out.mul_((lse - shift).exp_().unsqueeze(-1)).add_(other * (other_lse - shift).exp_().unsqueeze(-1))
    lse.copy_(total)
