"""LASP-2 (arXiv 2502.07563, Algorithms 2 and 4): one all-gather of a small state, whatever the sequence length.

Every rank gathers the states of all chunks and folds those before its own (in reverse: after them), in order. The
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
from .state_scan import Chain, fold, pack


def lasp2(
    states: Tensor, decays: Tensor | None, *, group: dist.ProcessGroup, chain: Chain, reverse: bool
) -> Callable[[], Tensor]:
    """Scan as described in `state_scan.py`."""
    pending = all_gather(pack(states, decays), group)
    order = chain[::-1] if reverse else chain

    def wait() -> Tensor:
        gathered = pending.wait()  # [W, L, B, H, D_k, D_v (+ 1)]
        fold_in_order = _fold_in_one_launch if gathered.is_cuda and device_obstacle(gathered.device) is None else _fold
        return fold_in_order(gathered, order, group_rank(group), states.shape[-1])

    return wait


def _fold(gathered: Tensor, order: Chain, own: int, value_dim: int) -> Tensor:
    """Return what enters the chunks of rank `own`, `[L, B, H, D_k, D_v]`."""
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

    messages, chunks = gathered.flatten(0, 1), gathered.shape[1]
    decays = None if messages.shape[-1] == value_dim else messages[..., -1]
    steps = _merge_steps(tuple(order), own, chunks, gathered.device)
    return merge(messages[..., :value_dim], decays, steps, chunks).transpose(0, 1)


@functools.lru_cache(maxsize=64)
def _merge_steps(order: tuple[tuple[int, int], ...], own: int, chunks: int, device: torch.device) -> Tensor:
    """The steps of `merge` that fold every chunk and store what enters those of rank `own`."""
    from ...ops.triton.merge import CONTINUE, NOTHING, ZERO, MergeStep, merge_steps

    last = max(i for i, (rank, _) in enumerate(order) if rank == own)
    steps = [
        MergeStep(rank * chunks + place, place if rank == own else NOTHING, CONTINUE if i else ZERO)
        for i, (rank, place) in enumerate(order[: last + 1])
    ]
    return merge_steps(steps, device)
