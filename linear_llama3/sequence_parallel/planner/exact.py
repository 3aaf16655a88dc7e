"""The fastest plan of a few sequences, exactly: dynamic programming over the sets that they can form."""

from __future__ import annotations

import numpy as np

from .group_costs import Integers, Table
from .partitions import partitions
from .placement import NEVER, Part, Placement, group_degrees

FEW = 10  # sequences: K of them form 2^K sets, and 3^K pairs of a set and a part of it


def exact_parts(table: Table, micro_batches: int | None = None) -> list[Part]:
    """Over all divisions into micro-batches, all partitions that `partitions` lists and all assignments.

    Args:
        table: of up to FEW sequences.
        micro_batches: how many; None: the best number.
    """
    return _Search(table).step(micro_batches)


def exact_seconds(table: Table) -> float:
    """About how long `exact_parts` takes, by counting."""
    options = partitions(table.devices, tuple(table.degrees.tolist()))
    return 2e-4 + 1e-8 * 3 ** len(table) * int((options.sum(1) <= len(table)).sum())


class _Search:
    """Sets are bits. All pairs of a set and a non-empty part of it lie side by side, ordered by the set."""

    def __init__(self, table: Table) -> None:
        self.table, self.full = table, (1 << len(table)) - 1
        sets = np.arange(self.full + 1)
        self.members = sets[:, None] >> np.arange(len(table)) & 1  # [2^K, K]
        self.whole, self.part = np.nonzero(((sets & sets[:, None]) == sets) & (sets > 0))
        self.rest = self.whole ^ self.part
        self.start = np.searchsorted(self.whole, np.arange(self.full + 2))
        fits = self.members @ table.lengths[:, None] <= table.capacity
        self.group = np.where(fits, table.fixed + self.members @ table.times, NEVER)  # [2^K, D]
        self.group[0] = NEVER
        self.slowest: dict[tuple[int, ...], Integers] = {}  # kinds of several groups, ascending -> ticks [2^K]

    def step(self, micro_batches: int | None) -> list[Part]:
        """The parts in the order of their longest sequences; empty where there are none."""
        one, partition = self._one_micro_batch()
        several = [np.where(np.arange(self.full + 1) == 0, 0, NEVER)]  # of 0, 1, ... micro-batches
        for _ in range(micro_batches or len(self.table)):
            several.append(self._least(one[self.part] + several[-1][self.rest]))
        count = micro_batches or int(np.argmin([ticks[self.full] for ticks in several]))
        if several[count][self.full] >= NEVER:
            return []
        parts, left = [], self.full
        for n in range(count, 0, -1):
            own = self._arg_least(left, one[self.part] + several[n - 1][self.rest])
            parts.append(self._part(own, int(one[own]), partition[own]))
            left ^= own
        return sorted(parts, key=lambda part: part.rows.tolist())

    def _one_micro_batch(self) -> tuple[Integers, Integers]:
        """Ticks of every set [2^K] and its partition [2^K, D]."""
        options = partitions(self.table.devices, tuple(self.table.degrees.tolist()))
        best = np.full(self.full + 1, NEVER)
        partition = np.zeros((len(best), options.shape[1]), dtype=np.int64)
        for option in options[options.sum(1) <= len(self.table)]:
            ticks = self._groups(_kinds(option))
            partition[ticks < best] = option
            best = np.minimum(best, ticks)
        return best, partition

    def _groups(self, kinds: tuple[int, ...]) -> Integers:
        """Ticks of the slowest of these groups, for every set [2^K]."""
        if len(kinds) == 1:
            return self.group[:, kinds[0]]
        if kinds not in self.slowest:
            others = self._groups(kinds[:-1])
            self.slowest[kinds] = self._least(np.maximum(self.group[self.part, kinds[-1]], others[self.rest]))
        return self.slowest[kinds]

    def _part(self, own: int, ticks: int, option: Integers) -> Part:
        """The micro-batch of a set: its groups' sets are found again, the largest group first."""
        kinds, left = _kinds(option), own
        groups = np.zeros(len(self.table), dtype=np.int64)
        for index in range(len(kinds) - 1):
            others = self._groups(kinds[: len(kinds) - 1 - index])
            mine = self._arg_least(left, np.maximum(self.group[self.part, kinds[-1 - index]], others[self.rest]))
            left ^= mine
            groups[self.members[left] > 0] = index + 1
        rows = np.flatnonzero(self.members[own])
        return Part(rows, Placement(ticks, group_degrees(self.table, option), groups[rows]))

    def _least(self, values: Integers) -> Integers:
        """Of every set over its parts, [pairs] -> [2^K]; NEVER of the empty set."""
        return np.minimum(np.append(NEVER, np.minimum.reduceat(values, self.start[1:-1])), NEVER)

    def _arg_least(self, whole: int, values: Integers) -> int:
        """The part of one set that has the least value."""
        start, end = self.start[whole], self.start[whole + 1]
        return int(self.part[start + values[start:end].argmin()])


def _kinds(option: Integers) -> tuple[int, ...]:
    return tuple(np.repeat(np.arange(len(option)), option).tolist())
