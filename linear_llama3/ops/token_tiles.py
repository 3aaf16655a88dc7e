"""What treats every token by itself, some tokens at a time: norms, MLPs, projections, the head.

What is wide (`intermediate_size`, the vocabulary) then never has the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE_NUMBERS = 2**27  # in the widest tensor of a tile: 256 MiB in bfloat16, and enough tokens to fill a GPU


def tile_tokens(width: int) -> int:
    """Tokens of a tile whose widest tensor has `width` numbers a token."""
    tokens = TILE_NUMBERS // width
    return max(tokens // 128 * 128 or tokens, 1)  # whole tiles of a matrix product


def in_tiles(function: Callable[..., Tensor], *inputs: Tensor, width: int) -> Tensor:
    """`function` of tensors `[B, T, ...]` that treats every token by itself, tile by tile.

    Of a sequence longer than a tile, only the inputs and the output are kept for the backward pass, which computes the
    rest again. Gradients of parameters are summed over the tiles in the parameters' dtype, as autograd sums all.

    Args:
        width: numbers a token in the widest tensor inside.
    """
    batch, tokens = inputs[0].shape[:2]
    size = max(tile_tokens(width) // batch, 1)
    if tokens <= size:
        return function(*inputs)
    pieces = zip(*(x.split(size, dim=1) for x in inputs), strict=True)
    return torch.cat([checkpoint(function, *piece, use_reentrant=False) for piece in pieces], dim=1)
