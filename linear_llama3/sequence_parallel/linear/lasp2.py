"""LASP-2 (arXiv 2502.07563, Algorithms 2 and 4): one all-gather of a small state, whatever the sequence length.

Every rank gathers the states of all links and folds those before its own (in reverse: behind them), in order. The
paper has no decay; its sum over the earlier ranks is the case a = 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import all_gather, group_rank
from .scan import Chain, fold, pack


def lasp2(
    states: Tensor, factors: Tensor | None, *, group: dist.ProcessGroup, chain: Chain, reverse: bool
) -> Callable[[], Tensor]:
    """See `scan.py`."""
    pending = all_gather(pack(states, factors), group)

    def wait() -> Tensor:
        gathered, own = pending.wait(), group_rank(group)  # [W, L, B, H, D_k, D_v (+ 1)]
        entering, state = torch.empty_like(states), torch.zeros_like(states[0])
        missing = len(states)
        for rank, place in reversed(chain) if reverse else chain:
            if rank == own:
                entering[place] = state
                missing -= 1
                if not missing:
                    break
            state = fold(state, gathered[rank, place])
        return entering

    return wait
