"""The chunks of a stream of packed documents: no chunk crosses a document's edge.

Names: B batch, T tokens, H kv heads, G query heads per kv head, n chunks of C tokens in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
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


class Chunks:
    """The blocks of a stream whose documents are the intervals between `boundaries`; `width` numbers are a token."""

    def __init__(self, boundaries: tuple[int, ...], device: torch.device, *, size: int, width: int) -> None:
        self.boundaries, self.device, self.size, self.width = boundaries, device, size, width
        self.documents = len(boundaries) - 1
        cached = CACHED_NUMBERS // width if device.type == "cpu" else MOST_TOKENS
        self.per_block = min(MOST_TOKENS, max(FEWEST_TOKENS, cached)) // size
        self.blocks = list(self._blocks())

    def document(self, n: int) -> Chunks:
        """The chunks of one document alone."""
        return Chunks(self.boundaries[n : n + 2], self.device, size=self.size, width=self.width)

    def _blocks(self) -> Iterator[Block]:
        starts, stops, documents = [], [], []
        for n, (a, b) in enumerate(zip(self.boundaries, self.boundaries[1:], strict=False)):
            edges = list(range(a, b, self.size))
            starts += edges
            stops += [*edges[1:], b]
            documents += [n] * len(edges)
        first = [i == 0 or documents[i] != documents[i - 1] for i in range(len(documents))]
        for i in range(0, len(starts), self.per_block):
            j = min(i + self.per_block, len(starts))
            slots, filled = self._slots(starts[i:j], stops[i:j])
            yield Block(
                size=j - i,
                chunk_size=self.size,
                start=starts[i],
                stop=stops[j - 1],
                slots=slots,
                filled=filled,
                first=tuple(documents[c] if first[c] else None for c in range(i, j)),
                last=tuple(documents[c] if c + 1 == len(first) or first[c + 1] else None for c in range(i, j)),
            )

    def _slots(self, starts: list[int], stops: list[int]) -> tuple[Tensor | None, Tensor | None]:
        if all(b - a == self.size for a, b in zip(starts, stops, strict=True)):
            return None, None
        slots = torch.tensor(starts).unsqueeze(1) + torch.arange(self.size)
        filled = slots < torch.tensor(stops).unsqueeze(1)
        slots = torch.where(filled, slots, torch.tensor(starts).unsqueeze(1))
        return slots.flatten().to(self.device), filled.flatten().to(self.device)


def chunks_of(q: Tensor, k: Tensor, boundaries: tuple[int, ...]) -> Chunks:
    """The chunks for queries `[B, T, H_q, D_k]` and keys `[B, T, H_kv, D_k]`."""
    size = chunk_size(boundaries, key_dim=q.shape[-1], groups=q.shape[2] // k.shape[2])
    return Chunks(boundaries, q.device, size=size, width=max(q.shape[0] * q.shape[2:].numel(), 1))
