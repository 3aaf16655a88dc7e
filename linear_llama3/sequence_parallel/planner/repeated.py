"""Plans that repeat the same groups in every micro-batch.

Those whose groups have one degree besides are what FlexSP is compared with, and what it must never fall behind.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .group_costs import Integers, Table
from .partitions import partitions
from .placement import NEVER, Part, Placement, group_degrees, placers
from .search import least_repeats, lower_bounds

MICRO_BATCH_COUNTS = 5  # numbers of micro-batches that are tried, from the least possible on (FlexSP, appendix A)
BLOCK = 2**20  # groups x sequences x partitions that are tried at once


def parts_of_one_degree(table: Table, *, degree: int | None = None, micro_batches: int | None = None) -> list[Part]:
    """The fastest plan of that degree, or of the best one degree; empty where there is none.

    Args:
        micro_batches: how many; None: the best number.
    """
    options = np.diag(table.devices // table.degrees)
    options = options[(table.devices % table.degrees == 0) & ((table.degrees == degree) | (degree is None))]
    return _fastest(table, *_repeated(table, options, micro_batches))


def parts_of_one_partition(table: Table, *, micro_batches: int | None = None) -> Iterator[list[Part]]:
    """Plans that repeat any groups, the most promising first: of every so many the fastest, empty if there is none."""
    options, counts = _repeated(table, partitions(table.devices, tuple(table.degrees.tolist())), micro_batches)
    if not len(options):
        return
    order = np.argsort(counts * lower_bounds(table, options * counts[:, None]), kind="stable")
    block = max(1, BLOCK // int((options.sum(1) * counts).max() * len(table)))
    for start in range(0, len(order), block):
        rows = order[start : start + block]
        yield _fastest(table, options[rows], counts[rows])


def _repeated(table: Table, options: Integers, micro_batches: int | None) -> tuple[Integers, Integers]:
    """Partitions [P, D] and how often each is repeated [P], where the sequences may have room and are enough."""
    least = least_repeats(table, options)
    options, least = options[least <= len(table)], least[least <= len(table)]
    counts = least[:, None] + np.arange(MICRO_BATCH_COUNTS)
    if micro_batches is not None:
        counts = np.full((len(options), 1), micro_batches)
    option, column = np.nonzero((counts >= least[:, None]) & (counts * options.sum(1)[:, None] <= len(table)))
    return options[option], counts[option, column]


def _fastest(table: Table, options: Integers, counts: Integers) -> list[Part]:
    """All groups of all micro-batches are filled at once, and those that take equally long run together."""
    best: tuple[int, list[Part]] = (int(NEVER), [])
    for place in placers(table):
        if not len(options):
            break
        ticks, chosen = place(table, options * counts[:, None])
        for row in np.flatnonzero(ticks < NEVER).tolist():
            parts = _together(table, options[row], int(counts[row]), chosen[row])
            best = min(best, (sum(part.placement.ticks for part in parts), parts), key=lambda plan: plan[0])
        options, counts = options[ticks == NEVER], counts[ticks == NEVER]
    return best[1]


def _together(table: Table, option: Integers, count: int, chosen: Integers) -> list[Part]:
    """`count` micro-batches of these groups, the slowest first. `chosen` [K] counts the groups of all of them."""
    degrees, every = group_degrees(table, option), group_degrees(table, option * count)
    kind = np.searchsorted(table.degrees, every)
    load = table.fixed[kind]
    np.add.at(load, chosen, table.times[np.arange(len(table)), kind[chosen]])
    own = [np.flatnonzero(degrees == degree) for degree in every]  # where its kind is in a micro-batch, [count * G]
    place = np.empty_like(load)  # of every group among those of its degree, the slowest first
    for degree in table.degrees:
        same = np.flatnonzero(every == degree)
        place[same[np.argsort(-load[same], kind="stable")]] = np.arange(len(same))
    batch = np.array([n // len(mine) for n, mine in zip(place, own, strict=True)])
    group = np.array([mine[n % len(mine)] for n, mine in zip(place, own, strict=True)])
    parts = []
    for n in range(count):
        rows = np.flatnonzero(batch[chosen] == n)
        parts.append(Part(rows, Placement(int(load[batch == n].max()), degrees, group[chosen[rows]])))
    return parts
