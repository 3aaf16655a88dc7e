"""Plans whose groups all have one degree: what FlexSP is compared with, and what it must never fall behind."""

from __future__ import annotations

import numpy as np

from .group_costs import Integers, Table
from .placement import NEVER, RULES, Part, Placement, longest_first

MICRO_BATCH_COUNTS = 5  # numbers of micro-batches that are tried, from the least possible on (FlexSP, appendix A)


def parts_of_one_degree(table: Table, *, degree: int | None = None, micro_batches: int | None = None) -> list[Part]:
    """The fastest plan of that degree, or of the best one; empty where there is none.

    All groups of all micro-batches are filled longest first, and those that take equally long run together.

    Args:
        micro_batches: how many; None: the best number.
    """
    options = []
    for kind, size in enumerate(table.degrees.tolist()):
        if (degree is None or size == degree) and table.devices % size == 0 and table.allowed[0, kind]:
            groups = table.devices // size
            least = -(-int(table.lengths.sum()) // (int(table.capacity[kind]) * groups))
            counts = range(least, least + MICRO_BATCH_COUNTS) if micro_batches is None else (micro_batches,)
            options += [(kind, groups, count) for count in counts if least <= count <= len(table) // groups]
    if not options:
        return []
    partitions = np.zeros((len(options), len(table.degrees)), dtype=np.int64)
    for row, (kind, groups, count) in enumerate(options):
        partitions[row, kind] = groups * count
    best: tuple[int, list[Part]] = (int(NEVER), [])
    left = np.arange(len(options))
    for rule in RULES:
        ticks, chosen = longest_first(table, partitions[left], rule)
        for row in np.flatnonzero(ticks < NEVER).tolist():
            kind, groups, _ = options[left[row]]
            parts = _together(table, kind, groups, chosen[row])
            best = min(best, (sum(part.placement.ticks for part in parts), parts), key=lambda plan: plan[0])
        left = left[ticks == NEVER]
        if not len(left):
            break
    return best[1]


def _together(table: Table, kind: int, groups: int, chosen: Integers) -> list[Part]:
    """Micro-batches of `groups` groups each, the slowest first."""
    load = np.zeros(chosen.max() + 1, dtype=np.int64)
    np.add.at(load, chosen, table.times[:, kind])
    place = np.empty_like(load)  # of every group among all
    place[np.argsort(-load, kind="stable")] = np.arange(len(load))
    parts = []
    for first in range(0, len(load), groups):
        rows = np.flatnonzero((place[chosen] >= first) & (place[chosen] < first + groups))
        own = place[chosen[rows]] - first
        ticks = int(table.fixed[kind] + load[chosen[rows]].max())
        parts.append(Part(rows, Placement(ticks, np.full(groups, table.degrees[kind]), own)))
    return parts
