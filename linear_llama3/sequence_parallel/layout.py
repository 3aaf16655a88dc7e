"""The tokens that each rank holds, and the sharding of tensors accordingly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..ops.visibility import Span
from .collectives import all_gather, group_rank, world_size


class Layout(ABC):
    """A rule that cuts a sequence into `chunks_per_rank * W` equal chunks and gives each rank some of them."""

    chunks_per_rank: int

    @abstractmethod
    def chunks(self, rank: int, ranks: int) -> tuple[int, ...]:
        """The chunks of a rank, ascending: the order in which it holds them."""

    def padded(self, length: int, ranks: int) -> int:
        """The length that `length` tokens are padded to, at the end, so that all chunks are equal."""
        multiple = self.chunks_per_rank * ranks
        return -(-length // multiple) * multiple

    def spans(self, rank: int, ranks: int, length: int, padded: int) -> tuple[Span, ...]:
        """The global positions of a rank's true tokens, a span for every chunk, empty ones too.

        Only the end of the sequence is padding and chunks ascend, so they are the first of the rank's tokens.
        """
        size = padded // (self.chunks_per_rank * ranks)
        return tuple((min(c * size, length), min((c + 1) * size, length)) for c in self.chunks(rank, ranks))

    def chain(self, ranks: int) -> tuple[tuple[int, int], ...]:
        """(rank, place on the rank) of every chunk, in the order of the sequence."""
        places = {c: (rank, i) for rank in range(ranks) for i, c in enumerate(self.chunks(rank, ranks))}
        return tuple(places[c] for c in range(len(places)))


class Contiguous(Layout):
    """Rank r holds tokens [r * C, (r + 1) * C), C = ceil(T / W)."""

    chunks_per_rank = 1

    def chunks(self, rank: int, ranks: int) -> tuple[int, ...]:
        return (rank,)


class Zigzag(Layout):
    """Rank r holds chunks r and 2W - 1 - r of 2W: every rank has the same causal work."""

    chunks_per_rank = 2

    def chunks(self, rank: int, ranks: int) -> tuple[int, ...]:
        return rank, 2 * ranks - 1 - rank


LAYOUTS: dict[str, Layout] = {"contiguous": Contiguous(), "zigzag": Zigzag()}


def get_layout(name: str, ranks: int | None = None) -> Layout:
    """The layout of that name; on one rank all are the same."""
    if name not in LAYOUTS:
        raise ValueError(f"layout must be one of {sorted(LAYOUTS)}, got {name!r}; register new layouts in LAYOUTS")
    return LAYOUTS["contiguous" if ranks == 1 else name]


def shard(
    x: Tensor,
    *,
    group: dist.ProcessGroup | None,
    dim: int = 1,
    layout: str = "contiguous",
    padding: float = 0,
) -> Tensor:
    """Cut this rank's shard from `x` `[B, T, ...]`, padded at the end of the sequence. No communication.

    Differentiable: the gradient of `x` on a rank is that of its own part, zero elsewhere.

    Args:
        x: the complete sequence, the same on every rank of `group`.
        dim: the sequence dim, T tokens long.
        padding: the value of the tokens past the end.
    """
    ranks, length = world_size(group), x.shape[dim]
    rule = get_layout(layout, ranks)
    if length == 0:
        raise ValueError(f"a sequence needs at least one token, got shape {tuple(x.shape)} with none in dim {dim}")
    padded = rule.padded(length, ranks)
    return _cut(x, rule.spans(group_rank(group), ranks, length, padded), padded // ranks, dim, padding)


def _cut(x: Tensor, spans: tuple[Span, ...], tokens: int, dim: int, padding: float = 0) -> Tensor:
    """The spans of `x` one after another, padded to `tokens`."""
    parts = [x.narrow(dim, start, stop - start) for start, stop in spans]
    part = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    missing = tokens - part.shape[dim]
    if not missing:
        return part
    # F.pad counts dims from the last one, two numbers each
    return F.pad(part, [0, 0] * (x.dim() - 1 - dim % x.dim()) + [0, missing], value=padding)


def unshard(
    x: Tensor, *, group: dist.ProcessGroup | None, length: int, dim: int = 1, layout: str = "contiguous"
) -> Tensor:
    """Gather the complete sequence `[B, T, ...]` from the shards `[B, C, ...]` on every rank, padding dropped.

    Differentiable by the rule of a replicated tensor: all ranks compute the same from the complete sequence, so each
    already holds its gradient and keeps its own part of it. (A rank that computes something different from it has to
    sum the gradients over the ranks itself.)
    """
    ranks = world_size(group)
    rule = get_layout(layout, ranks)
    check_length(x.shape[dim], ranks, layout, length)
    return x.narrow(dim, 0, length) if ranks == 1 else _Unshard.apply(x, group, length, dim % x.dim(), rule)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, length: int, dim: int, layout: Layout) -> Tensor:
        ctx.tokens, ctx.dim = x.shape[dim], dim
        ctx.spans = layout.spans(group_rank(group), world_size(group), length, ctx.tokens * world_size(group))
        parts = all_gather(x, group).wait().movedim(0, dim)  # W before the local tokens
        return to_sequence_order(parts, layout, dim).narrow(dim, 0, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _cut(grad, ctx.spans, ctx.tokens, ctx.dim), None, None, None, None


def check_length(tokens: int, ranks: int, layout: str, length: int) -> None:
    """Raise ValueError unless W shards of `tokens` local tokens can hold a sequence of `length`."""
    rule = get_layout(layout, ranks)
    if tokens % rule.chunks_per_rank:
        raise ValueError(
            f"layout {layout!r} gives a rank {rule.chunks_per_rank} equal chunks, got {tokens} local tokens; "
            "cut the sequence with shard(..., layout=...), which pads it"
        )
    if isinstance(length, bool) or not hasattr(length, "__index__"):  # on every rank, before any of them waits
        raise ValueError(f"length must be an integer, the tokens of the complete sequence, got {length!r}")
    if not 0 < length <= tokens * ranks:
        raise ValueError(
            f"length must be between 1 and the {ranks} x {tokens} = {tokens * ranks} tokens of all ranks, got {length}"
        )


def to_sequence_order(parts: Tensor, layout: Layout, dim: int) -> Tensor:
    """Join `[..., W, C, ...]`, W in `dim`, to the complete padded sequence `[..., W * C, ...]`."""
    ranks = parts.shape[dim]
    chunks = parts.flatten(dim, dim + 1).unflatten(dim, (ranks * layout.chunks_per_rank, -1))
    order = [rank * layout.chunks_per_rank + place for rank, place in layout.chain(ranks)]
    return _permute(chunks, order, dim).flatten(dim, dim + 1)


def to_rank_order(x: Tensor, layout: Layout, ranks: int, dim: int) -> Tensor:
    """Invert `to_sequence_order`: `[..., W * C, ...]` to `[..., W, C, ...]`."""
    chunks = x.unflatten(dim, (ranks * layout.chunks_per_rank, -1))
    order = [c for rank in range(ranks) for c in layout.chunks(rank, ranks)]
    return _permute(chunks, order, dim).flatten(dim, dim + 1).unflatten(dim, (ranks, -1))


def _permute(x: Tensor, order: list[int], dim: int) -> Tensor:
    return x if order == sorted(order) else x.index_select(dim, torch.tensor(order, device=x.device))
