"""Documents packed in a batch: their edges, from any of the descriptions that transformers accepts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

DOCUMENT_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""Keywords whose only purpose is to describe documents; `position_ids` that restart describe them as well."""

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # cu_seqlens -> (its version, edges)


def document_boundaries(cu_seqlens: Tensor | None, *, batch: int, tokens: int) -> tuple[int, ...]:
    """Check `cu_seqlens` of a complete sequence and return it as a tuple of ints; (0, T) where there is none."""
    if cu_seqlens is None:
        return (0, tokens)
    edges = read_cu_seqlens(cu_seqlens)
    check_edges(edges, batch=batch, tokens=tokens)
    return edges


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    tensor = isinstance(cu_seqlens, Tensor)
    if not tensor or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}" if tensor else f"a {type(cu_seqlens).__name__}"
        raise ValueError(f"cu_seqlens must be a 1-D integer tensor [N + 1], got {got}")


def read_cu_seqlens(cu_seqlens: Tensor) -> tuple[int, ...]:
    """Return `cu_seqlens` as a tuple of ints. Waits for the device, once for a tensor that all layers share."""
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
    """Raise ValueError unless these are the document edges of a complete sequence."""
    if batch != 1:
        raise ValueError(
            f"cu_seqlens packs documents in a batch of 1, got a batch of {batch}; "
            "flatten the rows into one and shift their edges"
        )
    if edges[0] != 0 or edges[-1] != tokens or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"cu_seqlens must start at 0, increase, and end at T = {tokens}, the tokens of the complete sequence (its "
            f"`length`, where one is given), got {edges[:8]}{'...' if len(edges) > 8 else ''} ending at {edges[-1]}; "
            "drop empty documents"
        )


def document_edges(
    inputs: Mapping[str, Any], attention_mask: Tensor | None, *, batch: int, length: int
) -> Tensor | None:
    """Edges int32 `[N + 1]` of the documents in the `batch * length` tokens read row after row; None if unpacked.

    Args:
        inputs: keyword arguments of a forward pass. Any one of these describes documents: `cu_seq_lens_q` or
            `cu_seq_lens_k` `[N + 1]`, `seq_idx` int `[B, T]` (a number for each document in a row), and `position_ids`
            `[1 or B, T]` that do not increase by one within a row.
        attention_mask: `[B, T]`, 0 at padding, where positions may jump.

    Raises:
        ValueError: descriptions contradict each other, packed rows have padding, or edges do not cover the batch row
            by row.
    """
    sizes = {"batch": batch, "length": length}
    given = {name: inputs[name] for name in DOCUMENT_KEYS[:2] if inputs.get(name) is not None}
    given = {name: _check_cu_seq_lens(edges, **sizes) for name, edges in given.items()}
    explicit = bool(given)
    if (seq_idx := inputs.get("seq_idx")) is not None:
        given["seq_idx"] = _edges_of(_check_numbers(seq_idx, **sizes).diff() != 0, **sizes)
    first = next(iter(given), "")
    edges = given.get(first)
    for name, others in given.items():
        if others.tolist() != given[first].tolist():
            raise ValueError(
                f"{first} and {name} must describe the same documents, got edges {given[first].tolist()} and "
                f"{others.tolist()}; give one of them"
            )
    if (position_ids := inputs.get("position_ids")) is not None:
        steps = position_ids.diff().expand(batch, -1)
        if attention_mask is not None:
            attended = attention_mask.bool()
            steps = steps.where(attended[:, 1:] & attended[:, :-1], 1)
        if edges is None:
            edges = _edges_of(steps != 1, **sizes)
        else:
            _check_positions(steps, first, edges)
    if edges is None or (not explicit and len(edges) == batch + 1):
        return None
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(
            "packed rows must not contain padding, got an attention_mask with "
            f"{int((attention_mask == 0).sum())} zeros; "
            "turn the padding into a separate document with labels -100 and remove the mask"
        )
    return edges


def _edges_of(starts: Tensor, *, batch: int, length: int) -> Tensor:
    """Return edges int32 `[N + 1]`; `starts` bool `[B, T - 1]` marks the tokens 1, 2, ... that start a document."""
    edges = F.pad(starts, (1, 0), value=True).flatten().nonzero().flatten().to(torch.int32)
    return torch.cat([edges, edges.new_tensor([batch * length])])


def _check_positions(steps: Tensor, name: str, edges: Tensor) -> None:
    """Raise ValueError if positions restart inside a document, or restart in one place and continue across an edge.

    Positions that never decrease describe no documents: they may continue, repeat or jump ahead across edges.
    `steps` `[B, T - 1]` are the differences of adjacent positions, `edges` are those that `name` gives.
    """
    starts = torch.isin(torch.arange(steps.shape[0] * (steps.shape[1] + 1), device=edges.device), edges)
    starts = starts.view(steps.shape[0], -1)[:, 1:].to(steps.device)
    back = steps < 0
    wrong = (back & ~starts) | (back.any() & starts & (steps == 1))
    if wrong.any():
        row, step = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name} and position_ids must describe the same documents, got edges {edges.tolist()}, but positions that "
            f"{'restart' if bool(back[row, step]) else 'continue'} at token {step + 1} of row {row}; give one of them"
        )


def _check_numbers(seq_idx: Tensor, *, batch: int, length: int) -> Tensor:
    if seq_idx.shape != (batch, length) or seq_idx.is_floating_point():
        raise ValueError(
            f"seq_idx must hold the number of each token's document, integers [B, T] = {(batch, length)}, got "
            f"{seq_idx.dtype} of shape {tuple(seq_idx.shape)}; leave it out if rows are not packed"
        )
    return seq_idx


def _check_cu_seq_lens(cu_seq_lens: Tensor, *, batch: int, length: int) -> Tensor:
    edges = cu_seq_lens.to(torch.int32).unique_consecutive()  # drops documents without tokens
    total = batch * length
    rows = torch.arange(0, total + 1, length, dtype=torch.int32, device=edges.device)
    if edges[0] != 0 or edges[-1] != total or (edges.diff() <= 0).any() or not torch.isin(rows, edges).all():
        raise ValueError(
            f"cu_seq_lens_q must increase from 0 to batch * length = {total} and hold the start of every row "
            f"(documents do not cross rows), got {edges.tolist()}"
        )
    return edges


def check_mask(attention_mask: Any) -> None:
    """Check that a padding mask `[B, T]` of any dtype holds only 0 and 1; masks of other kinds are ignored.

    Softmax layers would read every other value as 1. The check reads one number from the device: call it once per
    forward pass. It does nothing while a graph is traced or captured.

    Raises:
        ValueError: the mask has other values, such as the numbers of packed documents.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.dtype == torch.bool:
        return
    if torch.compiler.is_compiling() or (attention_mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    other = (attention_mask != 0) & (attention_mask != 1)
    if other.any():
        raise ValueError(
            f"attention_mask must be 0 at padding and 1 elsewhere, got {attention_mask[other].unique().tolist()[:8]}; "
            "describe packed documents by cu_seq_lens_q, restarting position_ids or seq_idx, without a mask"
        )


def restarting_positions(edges: Tensor, *, batch: int, length: int) -> Tensor:
    """Positions `[B, T]` that count from 0 in every document."""
    lengths = edges.diff()
    starts = edges[:-1].repeat_interleave(lengths)
    return (torch.arange(batch * length, device=edges.device) - starts).view(batch, length)
