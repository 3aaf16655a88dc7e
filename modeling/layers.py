"""Building blocks of the layers: tensors that casts must not round, and work done tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..ops.precision import working_dtype
from ..ops.token_tiles import in_tiles
from .configuration import LinearLlama3Config

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_FLOATS = {integer: real for real, integer in _INTEGERS.items()}


class ExactTensors(nn.Module):
    """Base class of modules whose buffers keep dtype and value when `.half()` or `.to(dtype)` casts the model.

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
    """Llama's rotary embedding with exact frequencies: rounding to bfloat16 (up to 0.2 %) would change the angles of
    distant tokens."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `[B, T, D]` of `position_ids` `[B, T]`, float64 if the hidden states `x` are, else
        float32."""
        return super().forward(x.new_empty(0, dtype=working_dtype(x)), position_ids)


def as_integers(table: Tensor) -> Tensor:
    """Return the bits of a float32 or float64 tensor as integers.

    Mixed precision, such as FSDP2's, casts every floating-point input of a layer to the dtype of its parameters, but
    leaves integers alone.
    """
    return table.view(_INTEGERS[table.dtype])


def as_floats(table: Tensor) -> Tensor:
    """Undo `as_integers`; return a floating-point tensor unchanged."""
    return table if table.is_floating_point() else table.view(_FLOATS[table.dtype])


class Tiled:
    """Base class of modules that can do a part of their work in tiles of the sequence."""

    config: LinearLlama3Config
    sequence_tiling = False

    def in_tiles(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Apply `function`, which treats every token by itself, to tensors `[B, T, ...]`; in tiles if enabled."""
        if not self.sequence_tiling:
            return function(*inputs)
        return in_tiles(function, *inputs, width=self.config.intermediate_size)


def enable_sequence_tiling(model: nn.Module, enabled: bool = True) -> None:
    """Enable or disable tiles of the sequence in all layers of `model`, wherever tokens do not mix.

    Norms, MLPs, and the output norm, gate and projection of linear layers then store only their inputs for the backward
    pass, and are recomputed there. A sequence that fits into one tile (2^27 numbers of the MLP's width) is not tiled.
    Use it in addition to activation checkpointing, which stores only the layers' inputs.

    Raises:
        ValueError: no layer of the model supports tiling.
    """
    modules = [module for module in model.modules() if isinstance(module, Tiled)]
    if not modules:
        raise ValueError(
            f"sequence tiling needs layers that support it, {type(model).__name__} has none; use a LinearLlama3 model"
        )
    for module in modules:
        module.sequence_tiling = enabled
