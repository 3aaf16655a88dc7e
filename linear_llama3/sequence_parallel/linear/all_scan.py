"""All-Scan (ZeCO, arXiv 2507.01004): the ring of LASP-1 with the state cut into K blocks along D_k, as a pipeline.

Rows of the state decay independently, so a rank hands on the first block while the second is still on its way to it.
A chain of h hops takes h - 1 + K block hops instead of h whole ones, with the same bytes. K weighs the latency of
a message against the idle ranks: (h - 1 + K) (latency + S / (K bandwidth)) is least at
K = sqrt((h - 1) S / (latency bandwidth)).
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch.distributed as dist
from torch import Tensor

from .chain import pass_along
from .scan import Chain

LATENCY_BYTES = 64 * 1024  # latency times bandwidth: what a link carries while one message starts


def all_scan(
    states: Tensor, factors: Tensor | None, *, group: dist.ProcessGroup, chain: Chain, reverse: bool
) -> Callable[[], Tensor]:
    """See `scan.py`."""
    blocks = number_of_blocks(states[0].numel() * states.element_size(), rows=states.shape[-2], hops=len(chain) - 1)
    return pass_along(states, factors, group=group, chain=chain, reverse=reverse, blocks=blocks)


def number_of_blocks(size: int, *, rows: int, hops: int) -> int:
    """K for a state of `size` bytes with D_k = `rows`."""
    return max(1, min(rows, round(sqrt((hops - 1) * size / LATENCY_BYTES))))
