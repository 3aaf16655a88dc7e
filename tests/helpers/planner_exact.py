"""Exact oracle: the fastest plan of up to about 13 sequences, by dynamic programming over all sets of them."""

from __future__ import annotations

import numpy as np

from linear_llama3.sequence_parallel.planner.group_costs import CostTable, Integers
from linear_llama3.sequence_parallel.planner.partitions import IMPOSSIBLE, partitions


def exact_cost(table: CostTable, micro_batches: int | None = None) -> int | None:
    """Least cost over all divisions into micro-batches, all partitions and all assignments; None if there is none.

    Args:
        table: K sequences form 2^K sets, and 3^K pairs of a set and a part of it.
        micro_batches: their number; None: the best number.
    """
    return _Search(table).step(micro_batches)


class _Search:
    """Sets are bits. All pairs of a set and a non-empty part of it are stored side by side, ordered by the set."""

    def __init__(self, table: CostTable) -> None:
        self.table, self.full = table, (1 << len(table)) - 1
        sets = np.arange(self.full + 1)
        self.members = sets[:, None] >> np.arange(len(table)) & 1  # [2^K, K]
        self.set, self.part = np.nonzero(((sets & sets[:, None]) == sets) & (sets > 0))
        self.rest = self.set ^ self.part
        self.start = np.searchsorted(self.set, np.arange(self.full + 2))
        fits = self.members @ table.lengths[:, None] <= table.capacity
        self.group = np.where(fits, table.fixed + self.members @ table.times, IMPOSSIBLE)  # [2^K, D]
        self.group[0] = IMPOSSIBLE
        self.slowest: dict[tuple[int, ...], Integers] = {}  # kinds of several groups, ascending -> [2^K]

    def step(self, micro_batches: int | None) -> int | None:
        one = np.full(self.full + 1, IMPOSSIBLE)
        options = partitions(self.table.devices, tuple(self.table.degrees.tolist()))
        for option in options[options.sum(1) <= len(self.table)]:
            one = np.minimum(one, self._groups(tuple(np.repeat(np.arange(len(option)), option).tolist())))
        costs = [np.where(np.arange(self.full + 1) == 0, 0, IMPOSSIBLE)]  # of 0, 1, ... micro-batches
        for _ in range(micro_batches or len(self.table)):
            costs.append(self._least(one[self.part] + costs[-1][self.rest]))
        best = min(int(cost[self.full]) for cost in (costs[1:] if micro_batches is None else costs[-1:]))
        return best if best < IMPOSSIBLE else None

    def _groups(self, kinds: tuple[int, ...]) -> Integers:
        """Cost of the slowest of these groups, for every set `[2^K]`."""
        if len(kinds) == 1:
            return self.group[:, kinds[0]]
        if kinds not in self.slowest:
            others = self._groups(kinds[:-1])
            self.slowest[kinds] = self._least(np.maximum(self.group[self.part, kinds[-1]], others[self.rest]))
        return self.slowest[kinds]

    def _least(self, values: Integers) -> Integers:
        """Minimum over the parts of every set, `[pairs]` -> `[2^K]`; `IMPOSSIBLE` for the empty set."""
        return np.minimum(np.append(IMPOSSIBLE, np.minimum.reduceat(values, self.start[1:-1])), IMPOSSIBLE)
