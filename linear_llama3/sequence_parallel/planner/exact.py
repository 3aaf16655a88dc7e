"""The fastest plan of a few sequences, or of bundles of them, by dynamic programming over sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .group_costs import Assignment, CostTable, Integers
from .partitions import IMPOSSIBLE, fewest_groups

EXACT = 11  # sequences or bundles: K of them form 2^K sets, and 3^K pairs of a set and a part of it


class Slot(NamedTuple):
    """Devices of a micro-batch that wait for groups."""

    devices: int
    floor: int = 0  # cost of the slowest of the micro-batch's other groups
    optional: bool = False  # may stay without sequences, and then costs nothing


def plan_bundles(table: CostTable, micro_batches: int | None) -> Assignment | None:
    """Find the fastest plan of the sequences in at most `EXACT` bundles; None if there is none.

    Args:
        micro_batches: their number; None: any.
    """
    fewest = fewest_groups(table.degrees.tolist(), table.devices)
    if (micro_batches or 1) * fewest > len(table):
        return None
    item = bundle(table.lengths, np.zeros(len(table), dtype=np.int64), EXACT)
    slots = [Slot(table.devices, optional=micro_batches is None)] * (micro_batches or len(table) // fewest)
    return fill(table, item, slots)


def bundle(lengths: Integers, group: Integers, most: int) -> Integers:
    """Join the two shortest bundles of any group until `most` are left; return the bundle of every sequence `[K]`.

    Args:
        group: `[K]` of every sequence; there are at most `most` groups.
    """
    found = np.arange(len(lengths))  # a bundle has the number of one of its sequences
    while True:
        own, number = np.unique(found, return_inverse=True)
        if len(own) <= most:
            return number
        size = np.bincount(number, lengths)
        order = np.lexsort((size, group[own]))
        joined = np.where(np.diff(group[own[order]]) == 0, size[order[:-1]] + size[order[1:]], np.inf)
        first = joined.argmin()
        one, other = own[order[first : first + 2]]
        found[found == other] = one


def fill(table: CostTable, item: Integers, slots: Sequence[Slot]) -> Assignment | None:
    """Find the fastest groups of the slots' devices; None if there are none.

    Args:
        item: `[K]` bundle of every sequence, which stays together.

    Returns:
        An assignment whose micro-batches are the slots that are used, numbered as they are.
    """
    members = (np.arange(item.max() + 1)[:, None] == item).astype(np.int64)  # [B, K]
    sets = _Sets(replace(table, lengths=members @ table.lengths, times=members @ table.times))
    micro_batch: list[int] = []
    kind: list[int] = []
    group = np.empty(len(table), dtype=np.int64)
    for n, own in enumerate(sets.divide(slots)):
        for column, part in sets.groups_of(own, slots[n].devices if own else 0):
            group[part >> item & 1 == 1] = len(kind)
            micro_batch.append(n)
            kind.append(column)
    return Assignment(np.array(micro_batch), np.array(kind), group) if kind else None


@lru_cache(maxsize=EXACT)
def _pairs(count: int) -> tuple[Integers, Integers, Integers]:
    """List every set with every part of it: the part and the rest `[3^K]`, and where a set's pairs start `[2^K]`."""
    sets = np.arange(1 << count)
    every, part = np.nonzero((sets & sets[:, None]) == sets)
    return part, every ^ part, np.searchsorted(every, sets)


class _Sets:
    """Costs of all sets of a table's rows. Sets are integers, whose bits are the rows."""

    def __init__(self, table: CostTable) -> None:
        self.table, self.everything = table, (1 << len(table)) - 1
        self.part, self.rest, self.start = _pairs(len(table))
        sets = np.arange(self.everything + 1)
        members = sets[:, None] >> np.arange(len(table)) & 1
        fits = members @ table.lengths[:, None] <= table.capacity
        self.group = np.where(fits & (sets > 0)[:, None], table.fixed + members @ table.times, IMPOSSIBLE)  # [2^K, D]
        self.nothing = np.where(sets == 0, 0, IMPOSSIBLE)
        self.known: dict[tuple[int, int], Integers] = {}

    def groups(self, devices: int, kinds: int) -> Integers:
        """Cost of the slowest group, for each set `[2^K]`, in groups of the smallest `kinds` degrees on all devices."""
        if devices == 0:
            return self.nothing
        if kinds == 0 or devices > len(self.table) * self.table.degrees[kinds - 1]:
            return np.full_like(self.nothing, IMPOSSIBLE)
        if (devices, kinds) not in self.known:
            best, left = self.groups(devices, kinds - 1), devices - int(self.table.degrees[kinds - 1])
            if left >= 0:
                pairs = np.maximum(self.group[self.part, kinds - 1], self.groups(left, kinds)[self.rest])
                best = np.minimum(best, np.minimum.reduceat(pairs, self.start))
            self.known[devices, kinds] = best
        return self.known[devices, kinds]

    def groups_of(self, own: int, devices: int) -> Iterator[tuple[int, int]]:
        """Column of the degree and set of each group that divides a set best, the largest degree first."""
        kinds = len(self.table.degrees)
        while devices:
            if self.groups(devices, kinds)[own] == self.groups(devices, kinds - 1)[own]:
                kinds -= 1
            else:
                devices -= int(self.table.degrees[kinds - 1])
                part = self._best_part(own, self.group[:, kinds - 1], self.groups(devices, kinds), np.maximum)
                yield kinds - 1, part
                own ^= part

    def divide(self, slots: Sequence[Slot]) -> list[int]:
        """Divide all rows over the slots, for the least sum of their costs: a set for each; none if impossible."""
        costs, totals = [], [self.nothing]
        for slot in slots:
            cost = np.maximum(self.groups(slot.devices, len(self.table.degrees)), slot.floor)
            costs.append(np.where(self.nothing == 0, 0, cost) if slot.optional else cost)
            pairs = costs[-1][self.part] + totals[-1][self.rest]
            totals.append(np.minimum(np.minimum.reduceat(pairs, self.start), IMPOSSIBLE))
        left, found = self.everything, []
        if totals[-1][left] < IMPOSSIBLE:
            for cost, total in zip(reversed(costs), reversed(totals[:-1]), strict=True):
                found.append(self._best_part(left, cost, total, np.add))
                left ^= found[-1]
        return found[::-1]

    def _best_part(self, own: int, part: Integers, rest: Integers, join: Callable[..., Any]) -> int:
        """Part of a set for which the costs of the part and of the rest, joined, are least."""
        pairs = slice(self.start[own], self.start[own] + (1 << own.bit_count()))
        parts = self.part[pairs]
        return int(parts[join(part[parts], rest[self.rest[pairs]]).argmin()])
