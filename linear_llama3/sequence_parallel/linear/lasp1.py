"""LASP-1 (arXiv 2404.02882; 2502.07563, Algorithm 6): the state goes round a ring, from rank to rank.

What needs no state runs on all ranks at once; then, in the order of the sequence, a rank receives the state of
everything before it, folds its own in and sends the result on: W - 1 hops one after another, each of one state. The
backward pass goes the other way with the gradient of the state. The state received is kept for the backward pass
(by `ops.chunked`, as for every strategy): it is not sent again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from .ring_scan import ring_scan
from .state_scan import Chain


def lasp1(
    states: Tensor, decays: Tensor | None, *, group: dist.ProcessGroup, chain: Chain, reverse: bool
) -> Callable[[], Tensor]:
    """Scan as described in `state_scan.py`."""
    return ring_scan(states, decays, group=group, chain=chain, reverse=reverse, blocks=1)
