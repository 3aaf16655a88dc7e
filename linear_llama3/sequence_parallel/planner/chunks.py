"""The cut of a step into micro-batches: FlexSP's blaster (arXiv 2412.01523, section 4.2)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .group_costs import Integers


def cut_evenly(lengths: Integers, count: int) -> list[slice]:
    """`count` consecutive, non-empty parts whose largest sum is as small as possible.

    Of sorted lengths, parts hold like with like: a micro-batch waits for its slowest group, and short sequences never
    wait for long ones. Bisection over the bound, with greedy cuts.

    Args:
        lengths: [K] with K >= count.
    """
    sums = np.concatenate([[0], np.cumsum(lengths)])

    def cut(bound: int) -> list[int]:
        edges = [0]
        for part in range(1, count + 1):
            last = len(lengths) - (count - part)  # leaves every later part one sequence
            edges.append(min(int(np.searchsorted(sums, sums[edges[-1]] + bound, side="right")) - 1, last))
        return edges

    low, high = int(lengths.max()), int(sums[-1])
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cut(middle)[-1] == len(lengths) else (middle + 1, high)
    return [slice(a, b) for a, b in pairwise(cut(low))]
