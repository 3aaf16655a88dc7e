"""The scan by all-to-all: the rows of the state are divided among the ranks, each scans its rows over all chunks.

Rows of the state decay independently. One all-to-all hands every rank its share of the rows of all links, which it
scans on its own; a second one takes the results back. A rank sends at most two states, whatever the number of ranks,
and there is no chain of hops. (Exclusive scans built this way are known from MPI.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..collectives import all_to_all, world_size
from .state_scan import Chain, fold, pack


def all_to_all_scan(
    states: Tensor, decays: Tensor | None, *, group: dist.ProcessGroup, chain: Chain, reverse: bool
) -> Callable[[], Tensor]:
    """Scan as described in `state_scan.py`."""
    ranks, value_dim = world_size(group), states.shape[-1]
    rows = pack(states, decays).flatten(1, 3)  # [L, R, D_v (+ 1)]
    total = rows.shape[1]
    rows = F.pad(rows, (0, 0, 0, -total % ranks))
    pending = all_to_all(rows.unflatten(1, (ranks, -1)).transpose(0, 1), group)

    def wait() -> Tensor:
        share = pending.wait()  # [W, L, R / W, D_v (+ 1)]: my rows of every rank's links
        entering = torch.empty_like(share[..., :value_dim])
        state = torch.zeros_like(entering[0, 0])
        for rank, place in reversed(chain) if reverse else chain:
            entering[rank, place] = state
            state = fold(state, share[rank, place])
        own = all_to_all(entering, group).wait()  # [W, L, R / W, D_v]: all rows of my links
        return own.transpose(0, 1).flatten(1, 2)[:, :total].reshape(states.shape)

    return wait
