"""The best groups of one micro-batch: all partitions, longest first, in the order of their lower bounds."""

from __future__ import annotations

import numpy as np

from .effort import Effort
from .exact import FEW, exact_parts, exact_seconds
from .group_costs import Integers, Table
from .partitions import partitions
from .placement import NEVER, SMALL, Part, Placement, group_degrees, least_slack, placers, placing_seconds
from .polish import polish

BLOCK = 64  # partitions at once
WEIGHT = 2**12  # products with ticks and with the number of groups stay in 63 bits
LENGTHS = 16  # of the step's, for which bounds are computed
POOL = 16  # placements of up to SMALL sequences that are polished
SHORT = 1e-3  # seconds: searching takes no less
SLACK = 256  # what can win by less than this fraction is not tried


def candidates(table: Table) -> tuple[Integers, Integers]:
    """Partitions that may hold the sequences [P, D], the most promising first, and their lower bounds [P]."""
    options = partitions(table.devices, tuple(table.degrees.tolist()))
    options = options[(options.sum(1) <= len(table)) & (least_repeats(table, options) <= 1)]
    bounds = lower_bounds(table, options)
    order = np.argsort(bounds, kind="stable")
    return options[order], bounds[order]


def least_repeats(table: Table, options: Integers) -> Integers:
    """Of every partition [P], at least how many have room for all sequences; NEVER where no number has.

    What does not fit the groups of the smaller capacities needs the others' room, and of sequences no shorter than one
    a group holds no more than its capacity holds of that one.
    """
    least = np.zeros(len(options), dtype=np.int64)
    for smaller in np.append(0, table.capacity):
        tokens = table.lengths[table.lengths > smaller].sum()
        room = options @ np.where(table.capacity > smaller, table.capacity, 0)
        least = np.maximum(least, np.where(room > 0, -(-tokens // np.maximum(room, 1)), NEVER if tokens else 0))
    for row in np.linspace(0, len(table) - 1, LENGTHS, dtype=np.int64):
        places = options @ (table.capacity // table.lengths[row])
        least = np.maximum(least, np.where(places > 0, -(-(row + 1) // np.maximum(places, 1)), NEVER))
    return least


def lower_bounds(table: Table, options: Integers) -> Integers:
    """Ticks [P] of the slowest group that no assignment whatsoever stays below.

    For any weights w of the degrees the slowest group takes at least the weighted mean of all, and that at least

        (sum over groups w fixed + sum over sequences min over the partition's degrees w time) / sum over groups w.

    Two kinds of weights are tried: the devices of a group, and the speed at which it would work off all sequences.
    Nor is it done before the longest sequence on its fastest degree.
    """
    kinds = len(table.degrees)
    used, which = np.unique((options > 0) @ (1 << np.arange(kinds)), return_inverse=True)
    subsets = [np.flatnonzero(subset >> np.arange(kinds) & 1) for subset in used]
    every = np.maximum(table.times.sum(0), 1)
    longest = np.where(table.allowed[0], table.fixed + table.times[0], NEVER)
    bounds = np.array([longest[subset].min() for subset in subsets], dtype=np.int64)[which]
    for weights in (table.degrees, np.maximum(WEIGHT * every.min() // every, 1)):
        times = np.where(table.allowed, table.times * weights, NEVER // len(table))
        least = np.array([times[:, subset].min(1).sum() for subset in subsets], dtype=np.int64)
        total = options @ (weights * table.fixed) + least[which]
        bounds = np.maximum(bounds, -(-total // (options @ weights)))
    return bounds


def enumerate_groups(table: Table, limit: int, effort: Effort) -> Placement | None:
    """The best placement over all partitions, or None where there is none in fewer ticks than `limit`.

    Exact for up to FEW sequences. Otherwise every partition is filled, unless its bound says that it cannot win by more
    than 1 / SLACK, or no effort is left. Of up to SMALL sequences every way of placing is tried, not only where the
    others find no room, and the best POOL are polished.
    """
    if len(table) <= FEW and (needed := exact_seconds(table)) < max(effort.left, SHORT):
        effort.spend(needed)
        parts = exact_parts(table, 1)
        return parts[0].placement if parts and parts[0].placement.ticks < limit else None
    options, bounds = candidates(table)
    small = len(table) <= SMALL
    found: list[Placement] = []  # fastest first
    best = limit
    for start in range(0, len(options), BLOCK):
        if bounds[start] >= best - best // SLACK or (start and not effort):
            break
        block = options[start : start + BLOCK]
        unplaced = np.arange(len(block))
        for place in placers(table):
            rows = np.arange(len(block)) if small and place is not least_slack else unplaced
            if not len(rows):
                break
            ticks, groups = place(table, block[rows])
            effort.spend(placing_seconds(table, block[rows], place))
            for row in ticks.argsort(kind="stable")[: POOL if small else 1]:
                if ticks[row] < NEVER:
                    found.append(Placement(int(ticks[row]), group_degrees(table, block[rows[row]]), groups[row]))
            found = sorted(found, key=lambda placement: placement.ticks)[: POOL if small else 1]
            best = min([best, *(placement.ticks for placement in found)])
            unplaced = np.setdiff1d(unplaced, rows[ticks < NEVER])
    if small:
        every = np.arange(len(table))
        found = [polish(table, [Part(every, one)], effort, pairs=True)[0].placement for one in found]
    winner = min(found, key=lambda placement: placement.ticks, default=None)
    return winner if winner is not None and winner.ticks < limit else None
