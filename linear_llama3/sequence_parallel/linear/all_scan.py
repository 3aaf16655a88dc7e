"""All-Scan (ZeCO, arXiv 2507.01004): the ring of LASP-1 with the state cut into K blocks along D_k, as a pipeline.

Rows of the state decay independently, so a rank forwards the first block while the second is still on its way to it.
A chain of h hops takes h - 1 + K block hops instead of h full ones, with the same bytes. K weighs the latency of
a message against the idle ranks: (h - 1 + K) (latency + S / (K bandwidth)) is least at
K = sqrt((h - 1) S / (latency bandwidth)), `costs.number_of_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from ..costs import number_of_blocks
from .ring_scan import ring_scan
from .state_scan import Chain


def all_scan(
    states: Tensor, decays: Tensor | None, *, group: dist.ProcessGroup, chain: Chain, reverse: bool
) -> Callable[[], Tensor]:
    """Scan as described in `state_scan.py`."""
    blocks = number_of_blocks(states[0].numel() * states.element_size(), rows=states.shape[-2], hops=len(chain) - 1)
    return ring_scan(states, decays, group=group, chain=chain, reverse=reverse, blocks=blocks)
