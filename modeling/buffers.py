"""Constant buffers and tables that casts must not round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..ops.precision import working_dtype

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_FLOATS = {integer: real for real, integer in _INTEGERS.items()}


class ExactBuffers(nn.Module):
    """A module whose own buffers keep dtype and value when `.half()`, `.bfloat16()` or `.to(dtype)` cast the model."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in exact.items():
            cast = getattr(self, name)
            if cast.dtype != value.dtype:
                setattr(self, name, nn.Buffer(value.to(cast.device), persistent=False))
        return self


class LinearLlama3RotaryEmbedding(ExactBuffers, LlamaRotaryEmbedding):
    """Llama's. Frequencies rounded to bfloat16, off by up to 0.2 %, would turn far tokens by other angles."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[B, T, D]` of `position_ids` `[B, T]`, float32 whatever the hidden states `x` are, float64
        for float64."""
        return super().forward(x.new_empty(0, dtype=working_dtype(x)), position_ids)


def as_integers(table: Tensor) -> Tensor:
    """The bits of a float32 or float64 tensor. Mixed precision (FSDP2's for one) casts every floating-point input of a
    layer to the dtype of its parameters, but no integers."""
    return table.view(_INTEGERS[table.dtype])


def as_floats(table: Tensor) -> Tensor:
    """What `as_integers` was given; a floating-point tensor stays as it is."""
    return table if table.is_floating_point() else table.view(_FLOATS[table.dtype])
