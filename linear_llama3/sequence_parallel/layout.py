"""Which tokens a rank holds, and cutting and joining tensors accordingly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..ops.linear_attention import document_edges
from .collectives import all_gather, group_rank, world_size


class Layout(Protocol):
    """Rank r's tokens, as one interval of the sequence after padding."""

    def padded(self, length: int, ranks: int) -> int:
        """The length that `length` tokens are padded to, at the end, so that every rank holds as many."""

    def interval(self, rank: int, ranks: int, padded: int) -> tuple[int, int]:
        """The tokens [start, stop) of a rank."""


class Contiguous:
    """Rank r holds tokens [r * C, (r + 1) * C), C = ceil(T / W)."""

    def padded(self, length: int, ranks: int) -> int:
        return -(-length // ranks) * ranks

    def interval(self, rank: int, ranks: int, padded: int) -> tuple[int, int]:
        tokens = padded // ranks
        return rank * tokens, (rank + 1) * tokens


LAYOUTS: dict[str, Layout] = {"contiguous": Contiguous()}


def get_layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise ValueError(f"layout must be one of {sorted(LAYOUTS)}, got {name!r}; register new layouts in LAYOUTS")
    return LAYOUTS[name]


def shard(
    x: Tensor,
    *,
    group: dist.ProcessGroup | None,
    dim: int = 1,
    layout: str = "contiguous",
    padding: float = 0,
) -> Tensor:
    """This rank's part of `x` `[B, T, ...]`, padded at the end of the sequence. No communication.

    Differentiable: the gradient of `x` on a rank is that of its own part, zero elsewhere.

    Args:
        x: the whole sequence, the same on every rank of `group`.
        dim: the sequence dim, T tokens long.
        padding: the value of the tokens past the end.
    """
    rule, ranks = get_layout(layout), world_size(group)
    length = x.shape[dim]
    if length == 0:
        raise ValueError(f"a sequence needs at least one token, got shape {tuple(x.shape)} with none in dim {dim}")
    start, stop = rule.interval(group_rank(group), ranks, rule.padded(length, ranks))
    part = x.narrow(dim, min(start, length), max(min(stop, length) - start, 0))
    missing = stop - start - part.shape[dim]
    if not missing:
        return part
    # F.pad counts dims from the last one, two numbers each
    return F.pad(part, [0, 0] * (x.dim() - 1 - dim % x.dim()) + [0, missing], value=padding)


def unshard(
    x: Tensor, *, group: dist.ProcessGroup | None, length: int, dim: int = 1, layout: str = "contiguous"
) -> Tensor:
    """The whole sequence `[B, T, ...]` from every rank's part `[B, C, ...]`, padding dropped, on every rank.

    Differentiable by the rule of a replicated tensor: all ranks go on to compute the same from the whole, so each
    already holds the gradient of the whole and keeps its own part of it. (A rank that computes something of its
    own from the whole has to sum the gradients over the ranks itself.)
    """
    get_layout(layout)
    ranks = world_size(group)
    if not x.shape[dim] * ranks >= length > 0:
        raise ValueError(f"length must be between 1 and the {ranks} x {x.shape[dim]} tokens of all ranks, got {length}")
    return x.narrow(dim, 0, length) if ranks == 1 else _Unshard.apply(x, group, length, dim % x.dim(), layout)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, length: int, dim: int, layout: str) -> Tensor:
        ctx.group, ctx.dim, ctx.layout = group, dim, layout
        ctx.interval = get_layout(layout).interval(
            group_rank(group), world_size(group), x.shape[dim] * world_size(group)
        )
        parts = all_gather(x, group).wait()
        return parts.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        start, stop = ctx.interval
        own = grad.narrow(ctx.dim, min(start, grad.shape[ctx.dim]), max(min(stop, grad.shape[ctx.dim]) - start, 0))
        missing = stop - start - own.shape[ctx.dim]
        pad = [0, 0] * (grad.dim() - 1 - ctx.dim) + [0, missing]
        return F.pad(own, pad), None, None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A rank's part of one global sequence: the true tokens, and the pieces of documents they belong to."""

    start: int  # global position of the first token
    tokens: int  # true tokens held; the local positions behind them are padding
    documents: tuple[int, ...]  # global edges (0, ..., length) of all documents
    packed: bool  # documents were given; the same on every rank

    @property
    def stop(self) -> int:
        return self.start + self.tokens

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Local edges of the pieces, (0, ..., tokens); (0,) on a rank without tokens."""
        inner = [edge - self.start for edge in self.documents if self.start < edge < self.stop]
        return (0, *inner, self.tokens) if self.tokens else (0,)

    @property
    def left_open(self) -> bool:
        """The first piece continues a document of an earlier rank."""
        return self.tokens > 0 and self.start not in self.documents


def locate(
    tokens: int,
    *,
    batch: int,
    group: dist.ProcessGroup | None,
    layout: str,
    cu_seqlens: Tensor | None,
    length: int | None,
) -> Part:
    """Checks what the caller says of the whole sequence, and finds this rank in it.

    Args:
        tokens: the local length C, padding included.
        cu_seqlens: global document edges `[N + 1]`, ending at the true length.
        length: the true global length; default: the end of `cu_seqlens`, else W * C.
    """
    rule, ranks = get_layout(layout), world_size(group)
    padded = tokens * ranks
    edges = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    if length is None:
        # `shard` pads to a multiple of W: edges that end in the last padding tell the length.
        length = edges[-1] if edges and rule.padded(edges[-1], ranks) == padded else padded
    if not 0 < length <= padded:
        raise ValueError(
            f"length must be between 1 and the {ranks} x {tokens} = {padded} tokens of all ranks, got {length}"
        )
    if edges is not None:
        edges = document_edges(cu_seqlens, batch=batch, tokens=length)
    start, stop = rule.interval(group_rank(group), ranks, padded)
    return Part(
        start=start,
        tokens=max(min(stop, length) - start, 0),
        documents=edges or (0, length),
        packed=edges is not None,
    )
