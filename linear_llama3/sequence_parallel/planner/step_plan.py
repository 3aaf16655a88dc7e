"""Plan one optimizer step: micro-batches, and in each the groups that finish first (FlexSP, arXiv:2412.01523).

The search (`search.py`) works on integers and is bounded by counts of work, never by time or chance. Every rank that
plans the same lengths makes the same plan, and nothing has to be broadcast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .group_costs import Assignment, Cluster, Costs, CostTable, tabulate
from .partitions import fewest_groups
from .search import least_micro_batches, one_degree, search


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Consecutive ranks [first_rank, first_rank + degree) that share sequences, packed end to end.

    The degree is a power of two and first_rank a multiple of it. So there are at most devices - 1 groups of two or more
    ranks (`aligned_groups`), and a group that fits a node never crosses its edge.
    """

    degree: int
    first_rank: int
    sequences: tuple[int, ...]  # positions in the lengths that were planned, the longest first
    tokens: int
    seconds: float  # predicted

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.degree)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Groups that cover all devices, the largest first; all start together and wait for the slowest."""

    groups: tuple[Group, ...]

    @property
    def seconds(self) -> float:
        return max(group.seconds for group in self.groups)

    def __str__(self) -> str:
        """Notation of the FlexSP paper: <32, 16, 8 x 2>."""
        counts = Counter(group.degree for group in self.groups)
        return f"<{', '.join(f'{d} x {n}' if n > 1 else str(d) for d, n in counts.items())}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One optimizer step: every rank runs all micro-batches, in this order."""

    devices: int
    micro_batches: tuple[MicroBatch, ...]

    @property
    def seconds(self) -> float:
        return sum(micro_batch.seconds for micro_batch in self.micro_batches)

    def for_rank(self, rank: int) -> tuple[Group, ...]:
        """Groups that `rank` belongs to, one for each micro-batch."""
        return tuple(next(g for g in batch.groups if rank in g.ranks) for batch in self.micro_batches)

    def __str__(self) -> str:
        return " ".join(map(str, self.micro_batches))


def aligned_groups(devices: int) -> list[tuple[int, int]]:
    """List (degree, first_rank) of every group of two or more ranks that a plan can contain, largest first.

    Process groups are created for these once. Every rank is in at most log2(devices) of them.
    """
    degrees = [1 << bit for bit in range(devices.bit_length() - 1, 0, -1)]
    return [(degree, first) for degree in degrees for first in range(0, devices - degree + 1, degree)]


def plan(lengths: Sequence[int], cluster: Cluster, costs: Costs, *, micro_batches: int | None = None) -> StepPlan:
    """Plan the groups for the sequences of one optimizer step.

    Args:
        lengths: tokens of every sequence, in any order; a plan names sequences by their positions here.
        costs: of groups of this model on this cluster (`model_costs`).
        micro_batches: their number; None tries several and takes the fastest.

    Returns:
        A plan with every sequence once and no empty group, never slower than `plan_one_degree`.

    Raises:
        ValueError: a sequence fits no group, or no plan was found.
    """
    if micro_batches is not None and micro_batches < 1:
        raise ValueError(f"a step needs one or more micro_batches, got {micro_batches}; None chooses")
    table = tabulate(lengths, cluster, costs)
    found = search(table, micro_batches)
    if found is None:
        raise ValueError(_infeasible(table, cluster, micro_batches))
    return _step_plan(table, found, costs)


def plan_one_degree(
    lengths: Sequence[int], cluster: Cluster, costs: Costs, *, degree: int | None = None
) -> StepPlan | None:
    """Find the fastest plan all of whose groups have this degree, or the best one degree; None if there is none."""
    table = tabulate(lengths, cluster, costs)
    found = one_degree(table, degree=degree)
    return _step_plan(table, found, costs) if found else None


def lower_bound(lengths: Sequence[int], cluster: Cluster, costs: Costs) -> float:
    """Seconds below which no plan stays.

    The least number of micro-batches, and either all work divided evenly over the devices or the longest sequence alone
    on its fastest degree.
    """
    table = tabulate(lengths, cluster, costs)
    fits = dict(zip(table.degrees.tolist(), table.capacity.tolist(), strict=True))
    fixed = min(costs.by_degree[degree].fixed for degree in fits)

    def least(length: int, devices: bool) -> float:
        own = {d: costs.seconds([length], d) - costs.seconds([], d) for d, tokens in fits.items() if length <= tokens}
        return min(d * own[d] if devices else own[d] + costs.by_degree[d].fixed - fixed for d in own)

    even = sum(least(length, devices=True) for length in table.lengths.tolist()) / cluster.devices
    return least_micro_batches(table) * fixed + max(even, least(int(table.lengths[0]), devices=False))


def _step_plan(table: CostTable, found: Assignment, costs: Costs) -> StepPlan:
    """Number the ranks: in every micro-batch the largest group first, so that each group is aligned to its degree."""
    batches = []
    for n in range(found.micro_batch.max() + 1):
        own = np.flatnonzero(found.micro_batch == n)
        groups, first_rank = [], 0
        for group in own[np.argsort(-found.kind[own], kind="stable")]:
            rows, degree = np.flatnonzero(found.group == group), int(table.degrees[found.kind[group]])
            groups.append(
                Group(
                    degree=degree,
                    first_rank=first_rank,
                    sequences=tuple(table.ids[rows].tolist()),
                    tokens=int(table.lengths[rows].sum()),
                    seconds=costs.seconds(table.lengths[rows].tolist(), degree),
                )
            )
            first_rank += degree
        batches.append(MicroBatch(groups=tuple(groups)))
    return StepPlan(devices=table.devices, micro_batches=tuple(batches))


def _infeasible(table: CostTable, cluster: Cluster, micro_batches: int | None) -> str:
    count = "any number of" if micro_batches is None else f"{micro_batches}"
    fewest = fewest_groups(table.degrees.tolist(), table.devices)
    most = int((table.capacity // table.degrees).max()) * table.devices
    return (
        f"a step must keep every device busy within its memory: for {len(table)} sequences of {table.lengths.sum():,} "
        f"tokens in {count} micro-batches on {cluster} no plan was found; a micro-batch needs {fewest} or more, "
        f"each in a group that holds it, and holds up to {most:,} tokens; take more sequences a step (short ones "
        "with long ones), another number of micro-batches, or more memory"
    )
