"""The chunks of a stream of packed documents: no chunk crosses a document's edge.

Names: B batch, T tokens, H kv heads, G query heads per kv head, n chunks of C tokens in a block.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_TOKENS = 1024  # in a block, worked on at once: bounds the temporaries
CACHED_NUMBERS = 2**18  # in one tensor of a block: larger ones would not stay in a CPU's cache
FEWEST_TOKENS = 256  # in a block, however wide: a state is kept for each


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Consecutive chunks, computed together."""

    size: int  # n
    chunk_size: int  # C
    start: int  # the tokens [start, stop) without a gap
    stop: int
    slots: Tensor | None  # int64 [n * C]: the token in each slot; None where slots and tokens are the same
    filled: Tensor | None  # bool [n * C]: False in the slots behind the end of a document
    first: tuple[int | None, ...]  # [n]: the document that starts with this chunk
    last: tuple[int | None, ...]  # [n]: the document that ends with this chunk

    def take(self, x: Tensor, dtype: torch.dtype, groups: int = 1) -> Tensor:
        """Read `[B, T, H * G, D]` as `[B, H, n, C * G, D]`, zero in slots that hold no token."""
        x = x[:, self.start : self.stop] if self.slots is None else x.index_select(1, self.slots)
        x = x.to(dtype)
        if self.filled is not None:
            x = x.masked_fill(~self.filled[:, None, None], 0)
        x = x.unflatten(2, (-1, groups)).unflatten(1, (self.size, -1))  # [B, n, C, H, G, D]
        return x.permute(0, 3, 1, 2, 4, 5).flatten(3, 4).contiguous()

    def put(self, x: Tensor, out: Tensor, groups: int = 1) -> None:
        """Invert `take`: write `[B, H, n, C * G, D]` into `out` `[B, T, H * G, D]`."""
        x = x.unflatten(3, (-1, groups)).permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)
        out[:, self.start : self.stop] = x if self.filled is None else x[:, self.filled]


def chunk_size(boundaries: tuple[int, ...], *, key_dim: int, groups: int) -> int:
    """Choose C: the work inside chunks grows with C * G, that on the states of all chunks with D_k / C.

    On CPUs 32 and 64 are the fastest at head dims 64 and 128; 16 and 128 lose. Short documents leave chunks half empty;
    smaller chunks waste less.
    """
    mean = (boundaries[-1] - boundaries[0]) // max(len(boundaries) - 1, 1)
    if mean < 16:
        return 16
    return 32 if mean < 32 or key_dim < 128 * groups else 64


def cut_into_blocks(boundaries: tuple[int, ...], device: torch.device, *, size: int, width: int) -> list[Block]:
    """Cut documents, the intervals between `boundaries`, into chunks of `size` tokens of `width` numbers each."""
    cached = CACHED_NUMBERS // width if device.type == "cpu" else MOST_TOKENS
    per_block = min(MOST_TOKENS, max(FEWEST_TOKENS, cached)) // size
    edges = list(enumerate(itertools.pairwise(boundaries)))
    chunks = [(n, a, min(a + size, stop)) for n, (start, stop) in edges for a in range(start, stop, size)]
    return [_block(chunks[i : i + per_block], boundaries, device, size) for i in range(0, len(chunks), per_block)]


def _block(chunks: list[tuple[int, int, int]], boundaries: tuple[int, ...], device: torch.device, size: int) -> Block:
    """`chunks`: document, start and stop of each."""
    slots = filled = None
    if any(b - a < size for _, a, b in chunks):
        starts, stops = (torch.tensor([chunk[i] for chunk in chunks]).unsqueeze(1) for i in (1, 2))
        slots = starts + torch.arange(size)
        filled = (slots < stops).flatten().to(device)
        slots = slots.minimum(stops - 1).flatten().to(device)
    return Block(
        size=len(chunks),
        chunk_size=size,
        start=chunks[0][1],
        stop=chunks[-1][2],
        slots=slots,
        filled=filled,
        first=tuple(n if a == boundaries[n] else None for n, a, _ in chunks),
        last=tuple(n if b == boundaries[n + 1] else None for n, _, b in chunks),
    )
