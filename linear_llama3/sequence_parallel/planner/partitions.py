"""Partitions of the devices into groups, and bounds that show which of them cannot hold the sequences or win."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from .group_costs import CostTable, Integers

IMPOSSIBLE = np.int64(2**60)  # cost
ALL_DEGREES_UP_TO, THREE_DEGREES_UP_TO = 64, 1024  # devices; beyond, partitions of at most three and two degrees
BOUND_WEIGHTS = 2**12  # largest weight in a lower bound: products with costs stay in 63 bits
ROOM_SAMPLES = 16  # sequences at which room is compared with need


@lru_cache(maxsize=16)
def partitions(devices: int, degrees: tuple[int, ...]) -> Integers:
    """List the ways in which powers of two add up to `devices`, as numbers of groups of every degree `[P, D]`.

    Args:
        degrees: D powers of two, ascending.
    """
    limit = len(degrees) if devices <= ALL_DEGREES_UP_TO else 3 if devices <= THREE_DEGREES_UP_TO else 2
    counts, rest = np.zeros((1, 0), dtype=np.int64), np.array([devices])
    for degree in degrees[:0:-1]:  # continue each partial row with 0, 1, ... groups of the next smaller degree
        options = rest // degree + 1
        rows = np.repeat(np.arange(len(rest)), options)
        added = np.arange(len(rows)) - np.repeat(options.cumsum() - options, options)
        counts, rest = np.column_stack([added, counts[rows]]), rest[rows] - added * degree
        keep = (counts > 0).sum(1) + (rest > 0) <= limit
        counts, rest = counts[keep], rest[keep]
    divides = rest % degrees[0] == 0
    found = np.column_stack([rest[divides] // degrees[0], counts[divides]])
    found.setflags(write=False)  # shared by all callers
    return found


def fewest_groups(degrees: Iterable[int], devices: int) -> int:
    """Smallest number of groups of these degrees that covers all devices; a micro-batch needs a sequence for each."""
    rest, count = devices, 0
    for degree in sorted(degrees, reverse=True):
        count, rest = count + rest // degree, rest % degree
    return count


def candidates(table: CostTable) -> tuple[Integers, Integers]:
    """List the partitions that may hold the sequences `[P, D]` and lower bounds of their costs `[P]`, ascending."""
    options = partitions(table.devices, tuple(table.degrees.tolist()))
    options = options[(options.sum(1) <= len(table)) & (least_repeats(table, options) <= 1)]
    bounds = lower_bounds(table, options)
    order = np.argsort(bounds, kind="stable")
    return options[order], bounds[order]


def least_repeats(table: CostTable, options: Integers) -> Integers:
    """Lower bound of how often each partition is needed to hold all sequences `[P]`; `IMPOSSIBLE` if it never does.

    Tokens that do not fit the groups of the smaller capacities need room in the others. Of sequences no shorter than
    one, a group holds at most the number of times that its capacity holds that one.
    """
    least = np.zeros(len(options), dtype=np.int64)
    for smaller in np.append(0, table.capacity):
        tokens = table.lengths[table.lengths > smaller].sum()
        room = options @ np.where(table.capacity > smaller, table.capacity, 0)
        least = np.maximum(least, np.where(room > 0, -(-tokens // np.maximum(room, 1)), IMPOSSIBLE if tokens else 0))
    for row in np.linspace(0, len(table) - 1, ROOM_SAMPLES, dtype=np.int64):
        places = options @ (table.capacity // table.lengths[row])
        least = np.maximum(least, np.where(places > 0, -(-(row + 1) // np.maximum(places, 1)), IMPOSSIBLE))
    return least


def lower_bounds(table: CostTable, options: Integers) -> Integers:
    """Costs [P] that no assignment of the sequences to a partition's groups stays below.

    For any weights w of the degrees the slowest group costs at least the weighted mean of all, and that at least

        (sum over groups w fixed + sum over sequences min over the partition's degrees w time) / sum over groups w.

    Two kinds of weights are tried: the devices of a group, and the speed at which it would compute all sequences. The
    longest sequence on its fastest degree is a bound as well.
    """
    kinds = len(table.degrees)
    used, which = np.unique((options > 0) @ (1 << np.arange(kinds)), return_inverse=True)
    subsets = [np.flatnonzero(subset >> np.arange(kinds) & 1) for subset in used]
    every = np.maximum(table.times.sum(0), 1)
    longest = np.where(table.allowed[0], table.fixed + table.times[0], IMPOSSIBLE)
    bounds = np.array([longest[subset].min() for subset in subsets], dtype=np.int64)[which]
    for weights in (table.degrees, np.maximum(BOUND_WEIGHTS * every.min() // every, 1)):
        times = np.where(table.allowed, table.times * weights, IMPOSSIBLE // len(table))
        least = np.array([times[:, subset].min(1).sum() for subset in subsets], dtype=np.int64)
        total = options @ (weights * table.fixed) + least[which]
        bounds = np.maximum(bounds, -(-total // (options @ weights)))
    return bounds
