"""Which sequence goes to which group: longest first, for many partitions at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from .group_costs import Integers, Table

NEVER = np.int64(2**60)  # ticks of what is impossible
SMALL = 24  # sequences up to which a search takes more trouble


class Placement(NamedTuple):
    """Of the sequences of a micro-batch."""

    ticks: int  # of the slowest group
    degrees: Integers  # [G] of the groups, descending
    groups: Integers  # [K] of the sequences


class Part(NamedTuple):
    """A micro-batch of a step."""

    rows: Integers  # of the step's table
    placement: Placement


@dataclass(slots=True)
class _Groups:
    """The groups of P partitions, padded to G columns with groups that hold nothing."""

    kind: Integers  # [P, G] column of the table, its last + 1 for padding
    load: Integers  # [P, G] ticks
    room: Integers  # [P, G] tokens


# What longest-first prefers, as a number [P, G] whose least one wins: (finish, room after, capacity) ->
Rule = Callable[[Integers, Integers, Integers], np.ndarray]


def longest_first(table: Table, partitions: Integers, rule: Rule) -> tuple[Integers, Integers]:
    """Takes the sequences in the order of the table and gives each to the best group that has room for it.

    Args:
        partitions: [P, D] groups of every degree.

    Returns:
        Ticks of the slowest group [P], NEVER where a sequence found no room or a group no sequence, and the group of
        every sequence [P, K], groups counted from the largest degree.
    """
    groups = _groups(table, partitions)
    every = np.arange(len(partitions))
    capacity = groups.room.copy()
    times = np.column_stack([table.times, np.zeros(len(table), dtype=np.int64)])
    chosen = np.empty((len(table), len(partitions)), dtype=np.int64)
    for row, length in enumerate(table.lengths):
        finish = times[row].take(groups.kind) + groups.load
        left = groups.room - length
        full = left < 0
        np.copyto(finish, NEVER, where=full)
        score = rule(finish, left, capacity)
        if score is not finish:
            score = np.where(full, NEVER, score)
        best = score.argmin(1)
        groups.load[every, best] = finish[every, best]
        groups.room[every, best] = left[every, best]
        chosen[row] = best
    real = groups.kind < len(table.degrees)
    empty = (groups.room == capacity) & real
    ticks = np.where(real, groups.load, 0).max(1)
    return np.where((ticks >= NEVER) | empty.any(1), NEVER, ticks), chosen.T


def least_slack(table: Table, partitions: Integers) -> tuple[Integers, Integers]:
    """As `longest_first`, but fills one group after the other: where memory is nearly all needed.

    The longest sequence left goes to the smallest group left that holds it, with those others that leave the least room
    (minimum bin slack: Gupta and Ho, Production Planning & Control 10, 1999).
    """
    ticks, chosen = np.full(len(partitions), NEVER), np.zeros((len(partitions), len(table)), dtype=np.int64)
    for row, partition in enumerate(partitions):
        kind = np.searchsorted(table.degrees, group_degrees(table, partition))
        groups = _fill(table, kind)
        if groups is not None:
            load = table.fixed[kind]
            np.add.at(load, groups, table.times[np.arange(len(table)), kind[groups]])
            ticks[row], chosen[row] = load.max(), groups
    return ticks, chosen


def _fill(table: Table, kind: Integers) -> list[int] | None:
    """The group of every sequence; None if one is left, or a group."""
    lengths, capacity = table.lengths.tolist(), table.capacity[kind].tolist()
    left, groups = list(range(len(table))), sorted(range(len(kind)), key=capacity.__getitem__)
    chosen = [0] * len(table)
    while left and groups:
        first, *others = left
        group = next((g for g in groups if capacity[g] >= lengths[first]), None)
        if group is None:
            return None
        own = {first, *(others[n] for n in _fullest([lengths[n] for n in others], capacity[group] - lengths[first]))}
        for n in own:
            chosen[n] = group
        groups.remove(group)
        left = [n for n in left if n not in own]
    return None if left or groups else chosen


def _fullest(lengths: list[int], room: int) -> list[int]:
    """Which of these have the largest sum within the room: bit n of an integer says whether n can be reached."""
    reached, every = [1], (1 << min(room, sum(lengths)) + 1) - 1
    for length in lengths:
        reached.append(reached[-1] | reached[-1] << length & every)
    total, own = reached[-1].bit_length() - 1, []
    for n in range(len(lengths) - 1, -1, -1):
        if not reached[n] >> total & 1:
            own.append(n)
            total -= lengths[n]
    return own


Placer = Callable[[Table, Integers], tuple[Integers, Integers]]  # as `longest_first`
LONGEST_FIRST: tuple[Placer, ...] = (
    partial(longest_first, rule=lambda finish, room, capacity: finish),  # to the group that is done first
    # fills all groups alike: where memory is short
    partial(longest_first, rule=lambda finish, room, capacity: -room / np.maximum(capacity, 1)),
    # best fit: leaves whole groups for what is hard to place
    partial(longest_first, rule=lambda finish, room, capacity: room),
)


def placers(table: Table) -> tuple[Placer, ...]:
    """Ways of placing, those to be tried first first; of many sequences least_slack would take long and gain little."""
    return (*LONGEST_FIRST, least_slack) if len(table) <= SMALL else LONGEST_FIRST


def placing_seconds(table: Table, partitions: Integers, place: Placer) -> float:
    """About how long it takes, by counting."""
    groups = int(partitions.sum(1).max())
    each = 4e-7 + 5e-12 * float(table.capacity.max()) if place is least_slack else 4e-9
    return len(table) * (1e-5 + each * len(partitions) * groups)


def _groups(table: Table, partitions: Integers) -> _Groups:
    count, kinds = len(partitions), partitions.shape[1]
    sizes = partitions.sum(1)
    kind = np.full((count, sizes.max()), kinds)
    filled = np.arange(sizes.max()) < sizes[:, None]
    descending = np.tile(np.arange(kinds)[::-1], count)
    kind[filled] = np.repeat(descending, partitions[:, ::-1].ravel())
    return _Groups(
        kind=kind,
        load=np.append(table.fixed, NEVER)[kind],
        room=np.append(table.capacity, -1)[kind],  # no room, not even for nothing
    )


def group_degrees(table: Table, partition: Integers) -> Integers:
    """[G], descending."""
    return np.repeat(table.degrees[::-1], partition[::-1])
