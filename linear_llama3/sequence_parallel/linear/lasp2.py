"""LASP-2 (arXiv 2502.07563, Algorithms 2 and 4): one all-gather of a small state, whatever the sequence length.

Every rank gathers the states of all links and folds those before its own (in reverse: behind them), in order. The
paper has no decay; its sum over the earlier ranks is the case a = 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ...ops.backends import device_obstacle
from ..collectives import all_gather, group_rank
from .scan import Chain, fold, pack


def lasp2(
    states: Tensor, factors: Tensor | None, *, group: dist.ProcessGroup, chain: Chain, reverse: bool
) -> Callable[[], Tensor]:
    """See `scan.py`."""
    pending = all_gather(pack(states, factors), group)
    order = chain[::-1] if reverse else chain

    def wait() -> Tensor:
        gathered = pending.wait()  # [W, L, B, H, D_k, D_v (+ 1)]
        fold_in_order = _fold_in_one_launch if gathered.is_cuda and device_obstacle(gathered.device) is None else _fold
        return fold_in_order(gathered, order, group_rank(group), states.shape[-1])

    return wait


def _fold(gathered: Tensor, order: Chain, own: int, value_dim: int) -> Tensor:
    """What enters the links of rank `own`, `[L, B, H, D_k, D_v]`."""
    entering, state = {}, torch.zeros_like(gathered[0, 0, ..., :value_dim])
    for rank, place in order:
        if rank == own:
            entering[place] = state
        if len(entering) == gathered.shape[1]:
            break
        state = fold(state, gathered[rank, place])
    return torch.stack([entering[place] for place in range(len(entering))])


def _fold_in_one_launch(gathered: Tensor, order: Chain, own: int, value_dim: int) -> Tensor:
    """The same by the kernel that merges the segments of one GPU."""
    from ...ops.triton.launch import merge

    messages, links = gathered.flatten(0, 1), gathered.shape[1]
    factors = None if messages.shape[-1] == value_dim else messages[..., -1]
    steps = _steps(tuple(order), own, links, gathered.device)
    return merge(messages[..., :value_dim], factors, steps, links).transpose(0, 1)


@functools.lru_cache(maxsize=64)
def _steps(order: tuple[tuple[int, int], ...], own: int, links: int, device: torch.device) -> Tensor:
    """For `merge`: every link is folded, and those of rank `own` receive the state before them. Kept: the copy to the
    device would wait for it."""
    last = max(i for i, (rank, _) in enumerate(order) if rank == own)
    rows = [
        (rank * links + place, place if rank == own else -1, -2 if i else -1)
        for i, (rank, place) in enumerate(order[: last + 1])
    ]
    return torch.tensor(rows, dtype=torch.int32).to(device)
