"""Gather what the ranks of a sequence hold on one of them, which continues alone. Without gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import group_rank, send_receive, world_size
from .layout import check_length, get_layout


def gather_to_rank(
    x: Tensor, *, group: dist.ProcessGroup | None, dst: int, length: int, dim: int = 1, layout: str = "contiguous"
) -> Tensor | None:
    """Unshard `x` on rank `dst` of the group alone; None on the others.

    Args:
        x: this rank's part of the sequence, C tokens long in `dim`, padding included.
        length: the true length of the complete sequence, T.
    """
    ranks = world_size(group)
    rule = get_layout(layout, ranks)
    check_length(x.shape[dim], ranks, layout, length)
    if group is None or ranks == 1:
        return x.narrow(dim, 0, length)
    if group_rank(group) != dst:
        send_receive([(x, dst)], [], group).wait()
        return None
    parts = x.new_empty(ranks, *x.shape)
    parts[dst] = x
    send_receive([], [(part, rank) for rank, part in enumerate(parts.unbind()) if rank != dst], group).wait()
    chunks = [part.chunk(rule.chunks_per_rank, dim) for part in parts.unbind()]
    return torch.cat([chunks[rank][place] for rank, place in rule.chain(ranks)], dim).narrow(dim, 0, length)


def send_final_state(
    x: Tensor, *, group: dist.ProcessGroup | None, dst: int, layout: str = "contiguous"
) -> Tensor | None:
    """`x` of the rank that holds the end of the sequence, on rank `dst` of the group; None on the others."""
    ranks, rank = world_size(group), group_rank(group)
    end, _ = get_layout(layout, ranks).chain(ranks)[-1]
    if group is None or end == dst:
        return x if rank == dst else None
    if rank not in (end, dst):
        return None
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    send, receive = ([(x, dst)], []) if rank == end else ([], [(received, end)])
    send_receive(send, receive, group).wait()
    return received if rank == dst else None
