"""Functions of single tokens (norms, MLPs, projections, the head), applied to a tile of tokens at a time.

Wide tensors (`intermediate_size`, the vocabulary) then never have the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE_NUMBERS = 2**27  # in the widest tensor of a tile: 256 MiB in bfloat16, and enough tokens to fill a GPU


def tile_tokens(width: int) -> int:
    """The number of tokens in a tile whose widest tensor has `width` numbers a token."""
    tokens = TILE_NUMBERS // width
    return max(tokens // 128 * 128 or tokens, 1)  # a multiple of the tiles of a matrix product


def in_tiles(function: Callable[..., Tensor], *inputs: Tensor, width: int) -> Tensor:
    """Apply a function of single tokens to tensors `[B, T, ...]`, tile by tile.

    For a sequence longer than a tile, the backward pass keeps only the inputs and the output and recomputes the rest.
    Gradients of parameters are summed over the tiles in the parameters' dtype, as autograd sums all.

    Args:
        width: numbers a token in the widest tensor inside.
    """
    batch, tokens = inputs[0].shape[:2]
    size = max(tile_tokens(width) // batch, 1)
    if tokens <= size:
        return function(*inputs)
    pieces = zip(*(x.split(size, dim=1) for x in inputs), strict=True)
    return torch.cat([checkpoint(function, *piece, use_reentrant=False) for piece in pieces], dim=1)
