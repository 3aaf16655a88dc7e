"""Search for the fastest groups of a step, after FlexSP (arXiv:2412.01523).

`search` plans steps of up to `EXACT` sequences by all their plans (`exact.py`), and others in this order, which is also
the order of this file:

1. Number of micro-batches M: from the least that memory allows, five numbers (appendix A).
2. Micro-batches: cut the sequences, sorted by length, into M consecutive parts of equal tokens (section 4.2).
3. Groups of a micro-batch: try the partitions of the devices into powers of two, in the order of a lower bound of their
   cost (`partitions.py`). The paper solves a mixed-integer program here (section 4.1); an enumeration needs no solver.
4. Sequences of a group: take the sequences longest first and give each to the group that then finishes first, the last
   ones to groups that have none.
5. Repeated partitions: the same partition in every micro-batch, with the sequences of all of them placed at once. This
   includes the plans of one degree, so that no plan is slower than those.
6. Local search: move and swap sequences, also between micro-batches, while that shortens the step.
7. Steps of fewer than `FEW` sequences: also start from the best plan of `EXACT` bundles of them, and at the end plan
   two micro-batches at a time again, exactly (`replan.py`).

Costs are integers and the search is bounded by counts, never by time. Every rank makes the same plan of the same
lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .exact import EXACT, plan_bundles
from .group_costs import Assignment, CostTable, Integers
from .partitions import IMPOSSIBLE, candidates, least_repeats, lower_bounds, partitions
from .replan import FEW, replan

MICRO_BATCH_COUNTS = 5  # numbers of micro-batches that are tried
PARTITIONS_PER_BLOCK = 64  # placed at once
CELLS_PER_DEVICE = 2**19  # groups x sequences x partitions that are placed for the first number of micro-batches
CELLS_PER_BLOCK = 2**20  # the same, of repeated partitions that are placed at once
PLANS_SEARCHED = 3  # plans that local search starts from
PAIRS_COMPARED = 2**23  # by each local search
LEAST_SAVING = 2**-14  # of a step, below which local search stops


def search(table: CostTable, micro_batches: int | None = None) -> Assignment | None:
    """Find a fast plan of a step, never slower than the best one of one degree; None if no plan is found.

    Args:
        micro_batches: their number; None chooses it.
    """
    if len(table) <= EXACT:
        return plan_bundles(table, micro_batches)
    options = partitions(table.devices, tuple(table.degrees.tolist()))
    found = [one_degree(table, micro_batches=micro_batches), next(repeated(table, options, micro_batches), None)]
    if len(table) < FEW:
        found.append(plan_bundles(table, micro_batches))
    best = _fastest(table, found)
    found += split(table, micro_batches, best.cost(table) if best else int(IMPOSSIBLE))
    if not any(found):
        found.append(next(filter(None, repeated(table, options, micro_batches)), None))
    best = _fastest(table, found)
    if best is None:
        return None
    promising = [one for one in found if one and one.cost(table) <= _within_reach(best.cost(table))]
    promising = sorted(promising, key=lambda one: one.cost(table))[:PLANS_SEARCHED]
    best = _fastest(table, [local_search(table, one) for one in promising])
    return replan(table, best, micro_batches) if best and len(table) < FEW else best


def _fastest(table: CostTable, found: Sequence[Assignment | None]) -> Assignment | None:
    return min((one for one in found if one), key=lambda one: one.cost(table), default=None)


def _within_reach(cost: int) -> int:
    """Cost from which local search may still get below this one; it is never that of an impossible plan."""
    return min(cost + cost // 16, int(IMPOSSIBLE))


def split(table: CostTable, micro_batches: int | None, known: int = int(IMPOSSIBLE)) -> Iterator[Assignment]:
    """Plan the micro-batches one by one, for several numbers of them.

    Args:
        known: cost of the best plan so far; what is far slower is abandoned.
    """
    counts = range(least_micro_batches(table), len(table) + 1)
    if micro_batches is not None:
        counts = range(micro_batches, min(micro_batches, len(table)) + 1)
    for tried, count in enumerate(counts):
        if tried >= MICRO_BATCH_COUNTS and known < IMPOSSIBLE:
            return
        tables = [table.part(cut) for cut in cut_evenly(table.lengths, count)]
        bounds = [_bound(part) for part in tables]
        cells, left = (CELLS_PER_DEVICE * table.devices >> 2 * tried) // count, _within_reach(known) - sum(bounds)
        parts = []
        for part, bound in zip(tables, bounds, strict=True):
            found = best_groups(part, left + bound, cells)
            if found is None:
                break
            parts.append(found)
            left -= found.cost(part) - bound
        else:
            sizes = np.cumsum([0, *(len(part.kind) for part in parts)])
            joined = Assignment(
                np.repeat(np.arange(count), np.diff(sizes)),
                np.concatenate([part.kind for part in parts]),
                np.concatenate([first + part.group for first, part in zip(sizes, parts, strict=False)]),
            )
            known = min(known, joined.cost(table))
            yield joined


def least_micro_batches(table: CostTable) -> int:
    """Fewest micro-batches that hold all tokens."""
    most = int((table.capacity // table.degrees).max()) * table.devices
    return -(-int(table.lengths.sum()) // most)


def _bound(table: CostTable) -> int:
    """Lower bound of the cost of a micro-batch."""
    longest = (table.fixed + table.times[0])[table.allowed[0]].min()
    return int(max(longest, table.fixed.min() + table.work.sum() // table.devices))


def cut_evenly(lengths: Integers, count: int) -> list[slice]:
    """Cut sorted lengths into consecutive, non-empty parts whose largest sum is as small as possible.

    Bisection over the largest sum, with greedy cuts.

    Args:
        lengths: `[K]` with K >= count.
    """
    sums = np.concatenate([[0], np.cumsum(lengths)])

    def cut(bound: int) -> list[int]:
        edges = [0]
        for part in range(1, count + 1):
            last = len(lengths) - (count - part)  # leaves every later part one sequence
            edges.append(min(int(np.searchsorted(sums, sums[edges[-1]] + bound, side="right")) - 1, last))
        return edges

    low, high = int(lengths.max()), int(sums[-1])
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cut(middle)[-1] == len(lengths) else (middle + 1, high)
    return [slice(a, b) for a, b in pairwise(cut(low))]


def best_groups(table: CostTable, limit: int, cells: int) -> Assignment | None:
    """Find the fastest partition of one micro-batch, with its sequences; None if none costs less than `limit`.

    Args:
        cells: groups x sequences x partitions after which the search stops.
    """
    options, bounds = candidates(table)
    best = None
    for start in range(0, len(options), PARTITIONS_PER_BLOCK):
        if bounds[start] >= limit - limit // 256 or cells < 0:  # a smaller gain is not worth a block
            break
        block = options[start : start + PARTITIONS_PER_BLOCK]
        cells -= int(len(table) * block.sum(1).max() * len(block))
        costs, groups = place(table, block)
        row = costs.argmin()
        if costs[row] < limit:
            limit, kind = int(costs[row]), group_kinds(block[row])
            best = Assignment(np.zeros_like(kind), kind, groups[row])
    return best


# Preference of longest-first as a number [P, G], the least is chosen: (cost afterwards, room afterwards, capacity) ->
Rule = Callable[[Integers, Integers, Integers], NDArray[np.generic]]
RULES: tuple[Rule, ...] = (
    lambda finish, room, capacity: finish,  # the group that finishes first
    lambda finish, room, capacity: -room / np.maximum(capacity, 1),  # the least filled: where memory is short
    lambda finish, room, capacity: room,  # best fit: leaves free groups for what is hard to place
)


def place(table: CostTable, options: Integers) -> tuple[Integers, Integers]:
    """Place the sequences longest first, by the next of `RULES` where one finds no room."""
    costs, groups = longest_first(table, options, RULES[0])
    for rule in RULES[1:]:
        rows = np.flatnonzero(costs >= IMPOSSIBLE)
        if len(rows):
            costs[rows], groups[rows] = longest_first(table, options[rows], rule)
    return costs, groups


def longest_first(table: CostTable, options: Integers, rule: Rule) -> tuple[Integers, Integers]:
    """Give each sequence, longest first, to the best group that has room for it, for P partitions at once.

    Once there are no more sequences than empty groups, only those are considered: every group needs a sequence.

    Args:
        options: `[P, D]` groups of every degree.

    Returns:
        Cost of the slowest group `[P]`, `IMPOSSIBLE` where a sequence found no room or a group got no sequence, and the
        group of every sequence `[P, K]`. Groups are counted from the largest degree.
    """
    sizes, kinds, every = options.sum(1), options.shape[1], np.arange(len(options))
    real = np.arange(sizes.max()) < sizes[:, None]  # [P, G]; the others pad
    kind = np.full(real.shape, kinds)
    kind[real] = np.repeat(np.tile(np.arange(kinds)[::-1], len(options)), options[:, ::-1].ravel())
    load, room = np.append(table.fixed, IMPOSSIBLE)[kind], np.append(table.capacity, -1)[kind]
    capacity, times = room.copy(), np.column_stack([table.times, np.zeros(len(table), dtype=np.int64)])
    chosen = np.empty((len(table), len(options)), dtype=np.int64)
    empty_groups = sizes.copy()
    for row, length in enumerate(table.lengths):
        finish = times[row].take(kind) + load
        left = room - length
        full = left < 0
        np.copyto(finish, IMPOSSIBLE, where=full)
        score = rule(finish, left, capacity)
        if score is not finish:
            score = np.where(full, IMPOSSIBLE, score)
        if (waiting := empty_groups >= len(table) - row).any():
            score = np.where(waiting[:, None] & (room < capacity), IMPOSSIBLE, score)
        best = score.argmin(1)
        empty_groups -= room[every, best] == capacity[every, best]
        load[every, best], room[every, best] = finish[every, best], left[every, best]
        chosen[row] = best
    cost = np.where(real, load, 0).max(1)
    return np.where((cost >= IMPOSSIBLE) | (empty_groups > 0), IMPOSSIBLE, cost), chosen.T


def group_kinds(option: Integers) -> Integers:
    """Columns of the degrees of a partition's groups `[G]`, the largest degree first."""
    return np.repeat(np.arange(len(option))[::-1], option[::-1])


def one_degree(table: CostTable, *, degree: int | None = None, micro_batches: int | None = None) -> Assignment | None:
    """Find the fastest plan of this degree, or of the best one degree; None if there is none."""
    options = np.diag(table.devices // table.degrees)
    options = options[(table.devices % table.degrees == 0) & ((table.degrees == degree) | (degree is None))]
    return _fastest(table, list(repeated(table, options, micro_batches)))


def repeated(table: CostTable, options: Integers, micro_batches: int | None = None) -> Iterator[Assignment | None]:
    """Yield plans that repeat one partition in every micro-batch: the fastest of each block of them."""
    least = least_repeats(table, options)
    options, least = options[least <= len(table)], least[least <= len(table)]
    counts = least[:, None] + np.arange(MICRO_BATCH_COUNTS)
    if micro_batches is not None:
        counts = np.full((len(options), 1), micro_batches)
    option, column = np.nonzero((counts >= least[:, None]) & (counts * options.sum(1)[:, None] <= len(table)))
    options, counts = options[option], counts[option, column]
    if not len(options):
        return
    order = np.argsort(counts * lower_bounds(table, options * counts[:, None]), kind="stable")
    block = max(1, CELLS_PER_BLOCK // int((options.sum(1) * counts).max() * len(table)))
    for start in range(0, len(order), block):
        rows = order[start : start + block]
        costs, groups = place(table, options[rows] * counts[rows, None])
        placed = np.flatnonzero(costs < IMPOSSIBLE)
        plans = [_together(table, options[rows[n]], int(counts[rows[n]]), groups[n]) for n in placed]
        yield _fastest(table, plans)


def _together(table: CostTable, option: Integers, count: int, group: Integers) -> Assignment:
    """Put the slowest groups of every degree into the same micro-batch, the next slowest into the next one."""
    kind = group_kinds(option * count)
    found = Assignment(np.zeros_like(kind), kind, group)
    order = np.lexsort((-found.loads(table), -kind))  # by degree, the slowest first
    micro_batch = np.empty_like(kind)
    micro_batch[order] = np.concatenate([np.repeat(np.arange(count), own) for own in option[::-1]])
    return found._replace(micro_batch=micro_batch)


def local_search(table: CostTable, start: Assignment) -> Assignment:
    """Move a sequence or swap two, always the change that saves most, while a change is worth it.

    The groups stay, none becomes empty and none exceeds its memory.
    """
    found, pairs, least = start, 0, int(start.cost(table) * LEAST_SAVING)
    while pairs < PAIRS_COMPARED:
        group, compared = _best_change(table, found, least)
        if group is None:
            break
        found, pairs = found._replace(group=group), pairs + compared
    return found


def _best_change(table: CostTable, found: Assignment, least: int) -> tuple[Integers | None, int]:
    """Make the change that saves most, if it saves more than `least`.

    Returns:
        The group of every sequence `[K]`, None for no change, and the number of pairs that were compared.
    """
    batch, kind, group = found
    count, groups, every = len(table), len(kind), np.arange(len(table) + len(kind))
    load, room = found.loads(table), table.capacity[kind]
    np.subtract.at(room, group, table.lengths)
    order = np.lexsort((-load, batch))  # by micro-batch, the slowest first
    starts = np.searchsorted(batch[order], np.arange(batch.max() + 1))
    slowest, several = order[starts], np.bincount(batch) > 1  # [M]
    peak, second = load[slowest], np.zeros_like(starts)
    second[several] = load[order[starts[several] + 1]]
    others = np.where(slowest[batch] == np.arange(groups), second[batch], peak[batch])  # [G] slowest other group

    # The columns are the sequences and, for each group, an empty sequence: to swap with that one is a move. [K + G]
    length, target = np.append(table.lengths, np.zeros_like(kind)), np.append(group, np.arange(groups))
    time = np.append(table.times, np.zeros((groups, len(table.degrees)), dtype=np.int64), 0)[:, kind]  # [K + G, G]
    rows = np.flatnonzero(slowest[batch[group]] == group)[:, None]  # [R, 1]: only the slowest groups matter
    source, moved = group[rows], length[rows] - length
    lone = np.bincount(group, minlength=groups) == 1
    possible = (source != target) & (moved <= room[target]) & (-moved <= room[source])
    possible &= ~(lone[source] & (every >= count))

    source_load = load[source] - time[rows, source] + time[:, source[:, 0]].T  # [R, K + G], after the change
    target_load = load[target] - time[every, target] + time[rows, target]
    a, b = batch[source], batch[target]
    relieved = np.maximum(source_load, second[a])
    inside = np.maximum(relieved, target_load)
    across = relieved + np.maximum(target_load, others[target]) - peak[b]
    saved = np.where(possible, peak[a] - np.where(a == b, inside, across), -1)
    row, column = divmod(int(saved.argmax()), saved.shape[1])
    if saved[row, column] <= least:
        return None, saved.size
    changed = group.copy()
    if column < count:
        changed[column] = source[row, 0]
    changed[rows[row, 0]] = target[column]
    return changed, saved.size
