"""Sums over complete documents that span several ranks, for attention without a causal mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import all_reduce, self_adjoint
from ..sequence_shard import SequenceShard

Scan = Callable[..., Callable[[], Tensor]]  # (states, decays, reverse=) -> wait: a strategy in its group


def document_totals(states: Tensor, *, scan: Scan, group: dist.ProcessGroup, shard: SequenceShard) -> Tensor:
    """Complete the states of this rank's pieces of documents `[N, B, H, D_k, D_v]` to those of the documents.

    Without a mask every token reads all of its document, a sum over ranks (arXiv 2502.07563, Algorithm 1; the sum of
    the backward pass is over ALL ranks). A sum has no order: one document is an all-reduce whatever the strategy. Of
    packed ones only the first and the last piece of a chunk can continue elsewhere, in two scans. The map is
    symmetric, so its gradient is the map itself.
    """
    return self_adjoint(partial(_totals, scan=scan, group=group, shard=shard), states)


def _totals(states: Tensor, *, scan: Scan, group: dist.ProcessGroup, shard: SequenceShard) -> Tensor:
    if not shard.packed:
        return all_reduce(states.sum(0), group).wait().expand_as(states)
    zero, chunks = torch.zeros_like(states[0]), shard.chunks
    opening = torch.stack([zero if c.opening is None else states[c.opening] for c in chunks])
    closing = torch.stack([zero if c.closing is None else states[c.closing] for c in chunks])
    decays = torch.stack([torch.full_like(zero[..., 0], float(c.passes_states_through)) for c in chunks])
    # one after the other: a scan may be a chain of messages, and two of them could wait for each other
    from_left = scan(closing, decays, reverse=False)()
    from_right = scan(opening, decays, reverse=True)()
    totals = states.clone()
    for chunk, earlier, later in zip(chunks, from_left, from_right, strict=True):
        if chunk.opening is not None:
            totals[chunk.opening] += earlier
        if chunk.closing is not None:
            totals[chunk.closing] += later
    return totals
