"""Norms, MLPs and output projections tile by tile, so that long sequences keep little for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..ops.token_tiles import in_tiles

if TYPE_CHECKING:
    from .configuration import LinearLlama3Config


class Tiled:
    """A module with a `config` that can do a part of its work in tiles of the sequence."""

    sequence_tiling = False
    if TYPE_CHECKING:  # transformers evaluates the annotations of a model's classes
        config: LinearLlama3Config

    def in_tiles(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function` of `[B, T, ...]` tensors that treats every token by itself."""
        if not self.sequence_tiling:
            return function(*inputs)
        return in_tiles(function, *inputs, width=self.config.intermediate_size)


def enable_sequence_tiling(model: nn.Module, enabled: bool = True) -> None:
    """Makes every layer of `model` treat long sequences in tiles where tokens do not mix, or again as a whole.

    Norms, MLPs, and the output norm, gate and projection of linear layers then keep only their inputs for the backward
    pass, and are computed once more there. A sequence that fits a tile (2^27 numbers of the MLP's width) is treated as
    before. Beside activation checkpointing, not in its place: that keeps only the layers' inputs.

    Raises:
        ValueError: the model has no layer that can.
    """
    modules = [module for module in model.modules() if isinstance(module, Tiled)]
    if not modules:
        raise ValueError(
            f"sequence tiling needs layers that can, {type(model).__name__} has none; use a LinearLlama3 model"
        )
    for module in modules:
        module.sequence_tiling = enabled
