"""Improves a finished plan: moves and swaps sequences, also between micro-batches, and divides two groups anew."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .effort import Effort
from .group_costs import Integers, Table
from .placement import Part, Placement

WORTH = 2**14  # a change must save more than this fraction of the step
PAIR = 10  # sequences of two groups that are divided anew in all 2^PAIR ways


def polish(table: Table, parts: list[Part], effort: Effort, *, pairs: bool = False) -> list[Part]:
    """The best change of one or two sequences again and again, while it is worth it and there is effort left.

    Never slower, never out of memory, no group left empty; the groups themselves stay.

    Args:
        pairs: where no such change is left, divide the slowest group of a micro-batch and another one anew, if they
            hold few sequences together. Finds more, and takes longer.
    """
    step = _Step(table, parts, effort)
    least = sum(part.placement.ticks for part in parts) // WORTH
    improved = True
    while improved and effort:
        improved = step.improve(least) or (pairs and step.divide_two(least))
    return step.parts()


class _Step:
    """The G groups of all M micro-batches side by side, with the K sequences of the step."""

    def __init__(self, table: Table, parts: list[Part], effort: Effort) -> None:
        self.table, self.effort = table, effort
        self.sizes = [len(part.placement.degrees) for part in parts]
        self.batch = np.repeat(np.arange(len(parts)), self.sizes)  # [G]
        self.degrees = np.concatenate([part.placement.degrees for part in parts])  # [G]
        self.kind = np.searchsorted(table.degrees, self.degrees)  # [G]
        self.group = np.empty(len(table), dtype=np.int64)  # [K]
        for part, first in zip(parts, np.cumsum(self.sizes) - self.sizes, strict=True):
            self.group[part.rows] = first + part.placement.groups
        self.divided: set[tuple[int, int, bytes]] = set()  # two groups and their sequences, once divided the best way
        # Behind the sequences one of no length in every group: swapping with it is a move. [K + G]
        self.length = np.append(table.lengths, np.zeros_like(self.kind))
        self.time = np.vstack([table.times, np.zeros((len(self.kind), len(table.degrees)), dtype=np.int64)])[
            :, self.kind
        ]

    def improve(self, least: int) -> bool:
        """Makes the change that saves most, if it saves more than `least` ticks."""
        count, groups = len(self.table), len(self.kind)
        load, room = self._load_and_room()
        order = np.lexsort((-load, self.batch))  # by micro-batch, the slowest first
        starts = np.cumsum(self.sizes) - self.sizes
        slowest = order[starts]  # [M]
        peak = load[slowest]
        follows = np.array([load[order[s + 1]] if n > 1 else 0 for s, n in zip(starts, self.sizes, strict=True)])
        others = np.where(slowest[self.batch] == np.arange(groups), follows[self.batch], peak[self.batch])  # [G]

        rows = np.flatnonzero(slowest[self.batch[self.group]] == self.group)[:, None]  # [R, 1]: only these matter
        self.effort.spend(2e-4 + 3e-8 * len(rows) * (count + groups))
        source, target = self.group[rows], np.append(self.group, np.arange(groups))  # [R, 1], [K + G]
        everything = np.arange(count + groups)
        source_load = load[source] - self.time[rows, source] + self.time[:, source[:, 0]].T  # [R, K + G]
        target_load = load[target] - self.time[everything, target] + self.time[rows, target]
        moved = self.length[rows] - self.length
        lone = np.bincount(self.group, minlength=groups) == 1
        possible = (source != target) & (moved <= room[target]) & (-moved <= room[source])
        possible &= ~(lone[source] & (everything >= count))

        a, b = self.batch[source], self.batch[target]
        relieved = np.maximum(source_load, follows[a])
        same = np.maximum(relieved, target_load)
        apart = relieved + np.maximum(target_load, others[target]) - peak[b]
        saved = np.where(possible, peak[a] - np.where(a == b, same, apart), -1)
        row, column = divmod(int(saved.argmax()), saved.shape[1])
        if saved[row, column] <= least:
            return False
        if column < count:
            self.group[column] = source[row, 0]
        self.group[rows[row, 0]] = target[column]
        return True

    def divide_two(self, least: int) -> bool:
        """Takes over `least` ticks from the slowest group of a micro-batch by the best division with another one."""
        load, _ = self._load_and_room()
        ends = np.cumsum(self.sizes)
        for first, end in zip(ends - self.sizes, ends, strict=True):
            slowest = first + int(load[first:end].argmax())
            for other in range(first, end):
                rows = np.flatnonzero((self.group == slowest) | (self.group == other))
                self.effort.spend(1e-5)
                if other == slowest or len(rows) > PAIR or (slowest, other, rows.tobytes()) in self.divided:
                    continue
                self.divided.add((slowest, other, rows.tobytes()))
                if self._divide(rows, slowest, other, load[slowest] - least):
                    return True
        return False

    def _divide(self, rows: Integers, a: int, b: int, limit: int) -> bool:
        """Gives every one of these sequences to group a or b, if both then take less than `limit` ticks."""
        self.effort.spend(1e-4 + 5e-8 * 2 ** len(rows))
        first = _divisions(len(rows))
        slower = np.zeros(len(first), dtype=np.int64)
        for group, own in ((a, first), (b, 1 - first)):
            kind = self.kind[group]
            ticks = self.table.fixed[kind] + own @ self.table.times[rows, kind]
            fits = own @ self.table.lengths[rows] <= self.table.capacity[kind]
            slower = np.maximum(slower, np.where(fits, ticks, limit))
        best = slower.argmin()
        if slower[best] >= limit:
            return False
        self.group[rows] = np.where(first[best] > 0, a, b)
        return True

    def parts(self) -> list[Part]:
        load, _ = self._load_and_room()
        parts, first = [], 0
        for size in self.sizes:
            rows = np.flatnonzero((self.group >= first) & (self.group < first + size))
            placement = Placement(
                int(load[first : first + size].max()), self.degrees[first : first + size], self.group[rows] - first
            )
            parts.append(Part(rows, placement))
            first += size
        return parts

    def _load_and_room(self) -> tuple[Integers, Integers]:
        load, room = self.table.fixed[self.kind], self.table.capacity[self.kind]
        np.add.at(load, self.group, self.time[np.arange(len(self.table)), self.group])
        np.subtract.at(room, self.group, self.table.lengths)
        return load, room


@lru_cache
def _divisions(count: int) -> Integers:
    """All ways to divide so many sequences in two, [2^count - 2, count]: 1 for the first part; none is empty."""
    return np.arange(1, 2**count - 1)[:, None] >> np.arange(count) & 1
