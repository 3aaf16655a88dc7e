"""Where the documents of a packed batch begin and end."""

from __future__ import annotations

import torch
from torch import Tensor


def document_edges(
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    attention_mask: Tensor | None,
    *,
    batch: int,
    length: int,
) -> Tensor | None:
    """Edges int32 `[N + 1]` of the documents in the `batch * length` tokens read row after row; None if unpacked.

    A batch is packed if `cu_seq_lens` is given or if `position_ids` `[1 or B, T]` do not run on by one inside a
    row. `attention_mask` `[B, T]` is 0 at padding, over which positions may jump. Raises `ValueError` for packed
    rows with padding, and for edges that do not cover the batch row by row.
    """
    if cu_seq_lens is None:
        if position_ids is None:
            return None
        starts = torch.ones(batch, length, dtype=torch.bool, device=position_ids.device)
        starts[:, 1:] = position_ids.diff() != 1
        if attention_mask is not None:
            attended = attention_mask.bool()
            starts[:, 1:] &= attended[:, 1:] & attended[:, :-1]
        edges = starts.flatten().nonzero().flatten().to(torch.int32)
        if len(edges) == batch:
            return None
        edges = torch.cat([edges, edges.new_tensor([batch * length])])
    else:
        edges = _check_edges(cu_seq_lens, batch=batch, length=length)
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(
            f"packed rows take no padding, got an attention_mask with {int((attention_mask == 0).sum())} zeros; "
            "make the padding a document of its own with labels -100 and drop the mask"
        )
    return edges


def _check_edges(cu_seq_lens: Tensor, *, batch: int, length: int) -> Tensor:
    edges = cu_seq_lens.to(torch.int32).unique_consecutive()  # documents without tokens take no part
    total = batch * length
    rows = torch.arange(0, total + 1, length, dtype=torch.int32, device=edges.device)
    if edges[0] != 0 or edges[-1] != total or (edges.diff() <= 0).any() or not torch.isin(rows, edges).all():
        raise ValueError(
            f"cu_seq_lens_q must increase from 0 to batch * length = {total} and hold the start of every row "
            f"(documents do not cross rows), got {edges.tolist()}"
        )
    return edges


def restarting_positions(edges: Tensor, *, batch: int, length: int) -> Tensor:
    """Positions `[B, T]` that count from 0 in every document."""
    lengths = edges.diff()
    starts = edges[:-1].repeat_interleave(lengths)
    return (torch.arange(batch * length, device=edges.device) - starts).view(batch, length)
