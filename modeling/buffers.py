"""Constant buffers, small parameters and tables that casts must not round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..ops.precision import working_dtype

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_FLOATS = {integer: real for real, integer in _INTEGERS.items()}


class ExactTensors(nn.Module):
    """A module whose own buffers keep dtype and value when `.half()`, `.bfloat16()` or `.to(dtype)` cast the model.

    Its `exact_parameters` are at least float32 after such a cast.
    """

    exact_parameters: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        buffers = dict(self.named_buffers(recurse=False))
        values = {name: x.data for name in self.exact_parameters if (x := self._parameters.get(name)) is not None}
        super()._apply(fn, recurse)
        for name, value in buffers.items():
            cast = getattr(self, name)
            if cast.dtype != value.dtype:
                setattr(self, name, nn.Buffer(value.to(cast.device), persistent=False))
        for name, value in values.items():
            parameter = getattr(self, name)
            if parameter.dtype != value.dtype:
                gradient, parameter.grad = parameter.grad, None
                parameter.data = value.to(parameter.device, working_dtype(parameter))
                parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        return self


class LinearLlama3RotaryEmbedding(ExactTensors, LlamaRotaryEmbedding):
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
