"""The best groups of one micro-batch: all partitions, longest first, in the order of their lower bounds."""

from __future__ import annotations

import numpy as np

from .group_costs import Integers, Table
from .partitions import EXHAUSTIVE, partitions
from .placement import NEVER, RULES, Placement, group_degrees, longest_first

BLOCK = 64  # partitions at once
BUDGET = 2**29  # beyond EXHAUSTIVE devices: groups x sequences x partitions that are tried for a micro-batch
WEIGHT = 2**16
SLACK = 256  # what can win by less than this fraction is not tried


def candidates(table: Table) -> tuple[Integers, Integers]:
    """Partitions that may hold the sequences [P, D], the most promising first, and their lower bounds [P]."""
    options = partitions(table.devices, tuple(table.degrees.tolist()))
    fits = (options.sum(1) <= len(table)) & (options @ table.capacity >= table.lengths.sum())
    options = options[fits & (options[:, table.allowed[0]].sum(1) > 0)]
    bounds = lower_bounds(table, options)
    order = np.argsort(bounds, kind="stable")
    return options[order], bounds[order]


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


def enumerate_groups(table: Table, limit: int = int(NEVER)) -> Placement | None:
    """The best placement over all partitions, or None where there is none in fewer ticks than `limit`.

    A partition is left out only where its bound says that it cannot win by more than 1 / SLACK, and beyond EXHAUSTIVE
    devices after BUDGET trials. Where longest-first finds no room, two rules that leave more of it are tried.
    """
    options, bounds = candidates(table)
    best, budget = None, BUDGET
    for start in range(0, len(options), BLOCK):
        if bounds[start] >= limit - limit // SLACK or budget <= 0:
            break
        block = options[start : start + BLOCK]
        for rule in RULES:
            ticks, groups = longest_first(table, block, rule)
            if table.devices > EXHAUSTIVE:
                budget -= block.sum(1).max() * groups.size
            winner = ticks.argmin()
            if ticks[winner] < limit:
                limit = int(ticks[winner])
                best = Placement(limit, group_degrees(table, block[winner]), groups[winner])
            block = block[ticks == NEVER]
            if not len(block):
                break
    return best
