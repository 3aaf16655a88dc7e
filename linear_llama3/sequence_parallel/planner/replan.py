"""Plan parts of a found plan again, exactly: two micro-batches at a time, with a few bundles of their sequences."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from .exact import Slot, bundle, fill
from .group_costs import Assignment, CostTable

FEW = 64  # sequences of a step; more are divided well by simpler means
BUNDLES = 9  # and groups that are planned at once
REPLANS = 64  # of a step


def replan(table: CostTable, found: Assignment, micro_batches: int | None) -> Assignment:
    """Plan pairs of micro-batches again while that shortens the step.

    Args:
        micro_batches: their number; None: micro-batches may be divided and joined.
    """
    tried: set[tuple[bytes, ...]] = set()
    improved = True
    while improved and len(tried) < REPLANS:
        improved = False
        for pair in combinations(range(found.micro_batch.max() + 2), 2):  # the last one is empty
            own = tuple(np.flatnonzero(found.micro_batch[found.group] == n).tobytes() for n in pair)
            if own not in tried and len(tried) < REPLANS:
                tried.add(own)
                new = _replan_two(table, found, pair, micro_batches)
                if new.cost(table) < found.cost(table):
                    found, improved = new, True
                    break
    return found


def _replan_two(table: CostTable, found: Assignment, pair: tuple[int, int], micro_batches: int | None) -> Assignment:
    """Plan the slowest and the fastest groups of two micro-batches again, up to `BUNDLES`; never slower."""
    load = found.loads(table)
    own = np.flatnonzero(np.isin(found.micro_batch, pair))
    own = own[np.argsort(-load[own], kind="stable")]
    own = np.sort(np.concatenate([own[: BUNDLES // 2], own[BUNDLES // 2 :][-(BUNDLES // 2) :]]))
    chosen = np.isin(np.arange(len(load)), own)
    slots = []
    for n in pair:
        inside = found.micro_batch == n
        others = load[inside & ~chosen]
        devices = int(table.degrees[found.kind[inside & chosen]].sum())
        if not inside.any() and micro_batches is None:
            devices = table.devices
        slots.append(Slot(devices, int(others.max(initial=0)), micro_batches is None and not len(others)))
    rows = np.flatnonzero(chosen[found.group])
    part = table.part(rows)
    new = fill(part, bundle(part.lengths, found.group[rows], BUNDLES), slots)
    assert new is not None, "the groups that there are fill the slots"
    group = (np.cumsum(~chosen) - 1)[found.group]
    group[rows] = (~chosen).sum() + new.group
    micro_batch = np.append(found.micro_batch[~chosen], np.array(pair)[new.micro_batch])
    return Assignment(np.unique(micro_batch, return_inverse=True)[1], np.append(found.kind[~chosen], new.kind), group)
