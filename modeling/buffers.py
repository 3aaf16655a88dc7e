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

    Such a cast leaves its `exact_parameters` in float32 or float64.
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
        """Return cosines and sines `[B, T, D]` of `position_ids` `[B, T]`, float64 if the hidden states `x` are, else
        float32."""
        return super().forward(x.new_empty(0, dtype=working_dtype(x)), position_ids)


def as_integers(table: Tensor) -> Tensor:
    """Return the bits of a float32 or float64 tensor as integers.

    Mixed precision, such as FSDP2's, casts every floating-point input of a layer to the dtype of its parameters, but no
    integers.
    """
    return table.view(_INTEGERS[table.dtype])


def as_floats(table: Tensor) -> Tensor:
    """Undo `as_integers`; return a floating-point tensor unchanged."""
    return table if table.is_floating_point() else table.view(_FLOATS[table.dtype])
