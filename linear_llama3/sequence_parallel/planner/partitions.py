"""Ways to divide the devices into groups."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .group_costs import Integers

EXHAUSTIVE = 64  # devices up to which all partitions are listed, and beyond only those of
MOST_DEGREES = 3  # so many different degrees: of 60 micro-batches on 128 devices none was slower for it
MANY = 1024  # devices beyond which only those of two degrees are: there would be millions


@lru_cache(maxsize=16)
def partitions(devices: int, degrees: tuple[int, ...]) -> Integers:
    """Groups of every degree, `[P, D]`, for all P ways in which these degrees add up to `devices`.

    Args:
        degrees: D powers of two, ascending.
    """
    limit = len(degrees) if devices <= EXHAUSTIVE else MOST_DEGREES if devices <= MANY else 2
    counts, rest = np.zeros((1, 0), dtype=np.int64), np.array([devices])
    for degree in degrees[:0:-1]:  # each partial row goes on with 0, 1, ... groups of the next smaller degree
        options = rest // degree + 1
        rows = np.repeat(np.arange(len(rest)), options)
        added = np.arange(len(rows)) - np.repeat(options.cumsum() - options, options)
        counts, rest = np.column_stack([added, counts[rows]]), rest[rows] - added * degree
        keep = (counts > 0).sum(1) + (rest > 0) <= limit
        counts, rest = counts[keep], rest[keep]
    whole = rest % degrees[0] == 0
    found = np.column_stack([rest[whole] // degrees[0], counts[whole]])
    found.setflags(write=False)  # shared by all callers
    return found
