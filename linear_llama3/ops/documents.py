"""Documents packed in a batch of 1: their edges, from the tensor that users know from variable-length kernels."""

from __future__ import annotations

import itertools

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # cu_seqlens -> (its version, edges)


def document_edges(cu_seqlens: Tensor | None, *, batch: int, tokens: int) -> tuple[int, ...]:
    """`cu_seqlens` of a whole sequence as a tuple of ints; (0, T) where there is none."""
    if cu_seqlens is None:
        return (0, tokens)
    edges = read_cu_seqlens(cu_seqlens)
    check_edges(edges, batch=batch, tokens=tokens)
    return edges


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be a 1-D integer tensor [N + 1], got a {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must be a 1-D integer tensor [N + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )


def read_cu_seqlens(cu_seqlens: Tensor) -> tuple[int, ...]:
    """As a tuple of ints. Waits for the device, once for a tensor that all layers are handed."""
    check_cu_seqlens(cu_seqlens)
    if not cu_seqlens.is_cuda or cu_seqlens.is_inference():
        return tuple(cu_seqlens.tolist())
    version, edges = _known.get(cu_seqlens, (None, ()))
    if version != cu_seqlens._version:
        edges = tuple(cu_seqlens.tolist())
        _known[cu_seqlens] = cu_seqlens._version, edges
    return edges


def drop_empty(edges: tuple[int, ...]) -> tuple[int, ...]:
    """Remove repeated edges, which enclose documents without tokens."""
    return tuple(edge for edge, _ in itertools.groupby(edges))


def check_edges(edges: tuple[int, ...], *, batch: int, tokens: int) -> None:
    """Whether these are the document edges of a whole sequence."""
    if batch != 1:
        raise ValueError(
            f"cu_seqlens packs documents in a batch of 1, got a batch of {batch}; "
            "flatten the rows into one and shift their edges"
        )
    if edges[0] != 0 or edges[-1] != tokens or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"cu_seqlens must start at 0, increase, and end at T = {tokens}, the tokens of the whole sequence (its "
            f"`length`, where one is given), got {edges[:8]}{'...' if len(edges) > 8 else ''} ending at {edges[-1]}; "
            "drop empty documents"
        )
