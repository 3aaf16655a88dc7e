"""Which sequence goes to which group: longest first, for many partitions at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .group_costs import Integers, Table

NEVER = np.int64(2**60)  # ticks of what is impossible


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


# What a rule prefers, as a number [P, G] whose least one wins: (finish, room after, capacity) ->
Rule = Callable[[Integers, Integers, Integers], np.ndarray]
RULES: tuple[Rule, ...] = (
    lambda finish, room, capacity: finish,  # the group that is done first
    lambda finish, room, capacity: -room / np.maximum(capacity, 1),  # fills all groups alike: where memory is short
    lambda finish, room, capacity: room,  # best fit: leaves whole groups for what is hard to place
)


def longest_first(table: Table, partitions: Integers, rule: Rule = RULES[0]) -> tuple[Integers, Integers]:
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
