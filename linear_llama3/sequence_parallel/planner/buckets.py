"""Buckets of like lengths, which keep FlexSP's program small whatever the number of sequences (section 4.1.3)."""

from __future__ import annotations

import numpy as np

from .group_costs import Integers


def bucket_starts(lengths: Integers, count: int) -> Integers:
    """First positions of `count` consecutive buckets; every length counts as its bucket's longest, its first.

    The least sum of what is added, by dynamic programming: error[q][k] of the first k lengths in q buckets is the
    minimum over j of error[q - 1][j] + (k - j) lengths[j] - sum(lengths[j:k]).

    Args:
        lengths: [K], descending, K >= count.
    """
    sums = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.arange(len(lengths) + 1)
    added = (ends - ends[:-1, None]) * lengths[:, None] - (sums - sums[:-1, None])  # [j, k] of one bucket
    never = np.int64(2**60)
    added[ends <= ends[:-1, None]] = never
    error, choices = np.where(ends == 0, 0, never), []
    for _ in range(count):
        total = np.minimum(error[:-1, None] + added, never)
        choices.append(total.argmin(0))
        error = total.min(0)
    starts, end = [], len(lengths)
    for choice in reversed(choices):
        end = int(choice[end])
        starts.append(end)
    return np.array(starts[::-1])
