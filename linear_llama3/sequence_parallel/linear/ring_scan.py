"""The scan from chunk to chunk along the ring of ranks, in blocks: what LASP-1 and All-Scan have in common.

A chunk waits for a block of rows of the state that enters it, folds its own state in, and sends the block on. With
several blocks the chunks work at the same time, each on another block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import Transfer, group_rank, send_receive
from .state_scan import Chain, fold, pack


class _Hop(NamedTuple):
    """One block that passes one chunk of this rank."""

    step: int  # the order in time, if every hop takes one step
    chunk: int  # its place in the chain
    block: int


def ring_scan(
    states: Tensor, decays: Tensor | None, *, group: dist.ProcessGroup, chain: Chain, reverse: bool, blocks: int
) -> Callable[[], Tensor]:
    """Scan as described in `state_scan.py`, with the state in `blocks` parts along D_k."""
    messages = pack(states, decays)
    return lambda: _scan(messages, torch.zeros_like(states), group, chain[::-1] if reverse else chain, blocks)


def _scan(messages: Tensor, entering: Tensor, group: dist.ProcessGroup, chain: Chain, blocks: int) -> Tensor:
    """Fill `entering`, the states that enter this rank's chunks; the messages are their own states and decays."""
    rank = group_rank(group)
    ranks = [chunk_rank for chunk_rank, _ in chain]
    hops = sorted(_Hop(c + i, c, i) for c in range(len(chain)) if ranks[c] == rank for i in range(blocks))
    between_own_chunks: dict[tuple[int, int], Tensor] = {}

    def rows(x: Tensor, hop: _Hop) -> Tensor:
        return x[chain[hop.chunk][1]].tensor_split(blocks, dim=-2)[hop.block]

    def exchange(sends: list[tuple[Tensor, int]], upcoming: list[_Hop]) -> Transfer:
        """Send a block while the one of the next hop comes in."""
        receives = [
            (torch.empty_like(rows(entering, hop), memory_format=torch.contiguous_format), ranks[hop.chunk - 1])
            for hop in upcoming
            if hop.chunk > 0 and ranks[hop.chunk - 1] != rank
        ]
        return send_receive(sends, receives, group)

    transfers = [exchange([], hops[:1])]
    for n, hop in enumerate(hops):
        state = rows(entering, hop)
        if hop.chunk > 0 and ranks[hop.chunk - 1] == rank:
            state.copy_(between_own_chunks.pop((hop.chunk, hop.block)))
        elif hop.chunk > 0:
            state.copy_(transfers[-1].wait()[0])
        sends = []
        if hop.chunk + 1 < len(chain):
            leaving = fold(state, rows(messages, hop))
            if ranks[hop.chunk + 1] == rank:
                between_own_chunks[hop.chunk + 1, hop.block] = leaving
            else:
                sends = [(leaving, ranks[hop.chunk + 1])]
        transfers.append(exchange(sends, hops[n + 1 : n + 2]))
    for transfer in transfers:
        transfer.wait()
    return entering
