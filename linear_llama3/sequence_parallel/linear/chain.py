"""Passing a state from link to link along the chain, in blocks: what LASP-1 and All-Scan have in common.

A link waits for a block of rows of the state that enters it, folds its own state in, and hands the block on. With
several blocks the links work at the same time, each on another block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import Transfer, group_rank, send_receive
from .scan import Chain, fold, pack


def pass_along(
    states: Tensor, factors: Tensor | None, *, group: dist.ProcessGroup, chain: Chain, reverse: bool, blocks: int
) -> Callable[[], Tensor]:
    """See `scan.py`; `blocks` parts along D_k."""
    entering = torch.zeros_like(states)
    progress = _pass_along(pack(states, factors), entering, group, chain[::-1] if reverse else chain, blocks)
    next(progress, None)  # up to the first block that has to be waited for

    def wait() -> Tensor:
        deque(progress, maxlen=0)  # to its end
        return entering

    return wait


def _pass_along(
    messages: Tensor, entering: Tensor, group: dist.ProcessGroup, chain: Chain, blocks: int
) -> Iterator[None]:
    """Fills `entering`; pauses before every block that comes from another rank."""
    rank = group_rank(group)
    ranks = [r for r, _ in chain] + [None]  # nobody behind the last link; and, as [-1], nobody before the first
    # In the order of time if every hop takes one step: waiting for nothing that comes later.
    tasks = sorted((c + i, c, i) for c, (r, _) in enumerate(chain) if r == rank for i in range(blocks))
    transfers: list[Transfer] = []
    at_home: dict[tuple[int, int], Tensor] = {}  # between two links of one rank

    def rows(x: Tensor, c: int, i: int) -> Tensor:
        return x[chain[c][1]].tensor_split(blocks, dim=-2)[i]

    def comes_from(c: int) -> int | None:
        return ranks[c - 1] if ranks[c - 1] != rank else None

    def exchange(send: list[tuple[Tensor, int]], upcoming: list[tuple[int, int, int]]) -> None:
        """Sends a block while the next one comes in."""
        receive = []
        for _, c, i in upcoming:
            if (source := comes_from(c)) is not None:
                receive = [(torch.empty_like(rows(entering, c, i), memory_format=torch.contiguous_format), source)]
        transfers.append(send_receive(send, receive, group))

    exchange([], tasks[:1])
    for n, (_, c, i) in enumerate(tasks):
        state = rows(entering, c, i)
        if comes_from(c) is not None:
            yield
            state.copy_(transfers[-1].wait()[0])
        elif c > 0:
            state.copy_(at_home.pop((c, i)))
        send = []
        if (target := ranks[c + 1]) is not None:
            leaving = fold(state, rows(messages, c, i))
            if target == rank:
                at_home[c + 1, i] = leaving
            else:
                send = [(leaving, target)]
        exchange(send, tasks[n + 1 : n + 2])
    for transfer in transfers:
        transfer.wait()
