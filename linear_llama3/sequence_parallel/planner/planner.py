"""The plan of a step: micro-batches, and in each the groups that are done first (FlexSP, arXiv 2412.01523).

What decides are integers and counts of work, never time or chance: every rank that plans the same lengths makes the
same plan, and nothing has to be broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from math import inf

import numpy as np

from .bundles import plan_bundled
from .chunks import cut_evenly
from .effort import Effort
from .exact import FEW, exact_parts
from .group_costs import Costs, Table, tabulate
from .milp import solve_milp
from .placement import NEVER, SMALL, Part, Placement
from .polish import polish
from .repeated import MICRO_BATCH_COUNTS, parts_of_one_degree, parts_of_one_partition
from .search import enumerate_groups
from .step_plan import Cluster, Group, MicroBatch, StepPlan, fewest_groups

Solver = Callable[[Table, int, Effort], Placement | None]  # in fewer ticks than the second argument, if it can
SOLVERS = ("enumeration", "milp")
CLOSE = 16  # what is slower than the fastest by up to 1 / CLOSE is polished too


def plan(
    lengths: Sequence[int],
    cluster: Cluster,
    costs: Costs,
    *,
    micro_batches: int | None = None,
    solver: str = "enumeration",
) -> StepPlan:
    """Groups for the sequences of one optimiser step.

    Args:
        lengths: tokens of every sequence, in any order; a plan names sequences by their positions here.
        costs: of groups of this model on this cluster (`model_costs`).
        micro_batches: how many; None tries several numbers and takes the fastest.
        solver: "enumeration" (up to `FEW` sequences: all plans), or "milp": FlexSP's mixed-integer program (`milp.py`),
            a slow reference that needs scipy and whose time limit makes it unfit to run on every rank.

    Returns:
        Every sequence once, no group without a sequence; from "enumeration" never slower than `plan_one_degree`.

    Raises:
        ValueError: a sequence that fits no group, or sequences for which no plan was found: up to `FEW`, there is none.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if micro_batches is not None and micro_batches < 1:
        raise ValueError(f"a step needs one or more micro_batches, got {micro_batches}; None chooses")
    table = tabulate(lengths, cluster, costs)
    if solver == "milp":
        parts = _fastest(_candidates(table, lambda part, *_: solve_milp(part).placement, micro_batches, Effort(inf)))
    elif len(table) <= FEW:
        parts = exact_parts(table, micro_batches)
    else:
        parts = _search(table, micro_batches, Effort.of_step(cluster.devices))
    if not parts:
        raise ValueError(_infeasible(table, cluster, micro_batches))
    return _step_plan(table, parts, costs)


def plan_one_degree(
    lengths: Sequence[int], cluster: Cluster, costs: Costs, *, degree: int | None = None
) -> StepPlan | None:
    """The fastest plan all of whose groups have this degree, or the best one degree; None where there is none."""
    table = tabulate(lengths, cluster, costs)
    parts = parts_of_one_degree(table, degree=degree)
    return _step_plan(table, parts, costs) if parts else None


def lower_bound(lengths: Sequence[int], cluster: Cluster, costs: Costs) -> float:
    """Seconds that no plan stays below.

    The least number of micro-batches, with all work divided evenly over the devices, or with the longest sequence on
    its fastest degree and nothing beside it.
    """
    table = tabulate(lengths, cluster, costs)
    fits = dict(zip(table.degrees.tolist(), table.capacity.tolist(), strict=True))
    fixed = min(costs.by_degree[degree].fixed for degree in fits)

    def least(length: int, devices: bool) -> float:
        own = {d: costs.seconds([length], d) - costs.seconds([], d) for d, tokens in fits.items() if length <= tokens}
        return min(d * own[d] if devices else own[d] + costs.by_degree[d].fixed - fixed for d in own)

    even = sum(least(length, devices=True) for length in table.lengths.tolist()) / cluster.devices
    return _least_micro_batches(table) * fixed + max(even, least(int(table.lengths[0]), devices=False))


def _search(table: Table, micro_batches: int | None, effort: Effort) -> list[Part]:
    """Of more than FEW sequences."""
    repeated = parts_of_one_partition(table, micro_batches=micro_batches)
    found = [parts_of_one_degree(table, micro_batches=micro_batches), next(repeated, [])]
    if len(table) <= SMALL:
        found.append(plan_bundled(table, micro_batches, effort))
    known = _ticks(_fastest(found)) or int(NEVER)
    found += _candidates(table, enumerate_groups, micro_batches, effort.lend(3 / 4), known)
    if not any(found):
        found += islice(filter(None, repeated), 1)
    limit = _close(_ticks(_fastest(found)))
    parts = _fastest([polish(table, parts, effort.lend(1 / 4)) for parts in found if parts and _ticks(parts) <= limit])
    if not parts:
        return []
    return polish(table, parts, effort, pairs=True)


def _candidates(
    table: Table, solve: Solver, micro_batches: int | None, effort: Effort, known: int = int(NEVER)
) -> Iterator[list[Part]]:
    """For several numbers of micro-batches, the least possible one first, unless they are far slower than `known`."""
    least, last = _least_micro_batches(table), len(table)
    if micro_batches is not None:
        least, last = micro_batches, min(micro_batches, last)
    for tried, count in enumerate(range(least, last + 1)):
        if known < NEVER and (tried >= MICRO_BATCH_COUNTS or (tried and not effort)):
            break
        limit, own_effort = _close(known), effort.lend(1 / 2)
        rows = [np.arange(cut.start, cut.stop) for cut in cut_evenly(table.lengths, count)]
        bounds = [_bound(table.part(own)) for own in rows]
        parts: list[Part] = []
        for n, own in enumerate(rows):
            left = limit - _ticks(parts) - sum(bounds[n + 1 :])
            share = own_effort.lend(1 / (count - n))
            placement = solve(table.part(own), left, share) if bounds[n] < left else None
            if placement is None:
                break
            parts.append(Part(own, placement))
        else:
            known = min(known, _ticks(parts))
            yield parts


def _least_micro_batches(table: Table) -> int:
    """No fewer hold all tokens."""
    most = int((table.capacity // table.degrees).max()) * table.devices
    return -(-int(table.lengths.sum()) // most)


def _bound(table: Table) -> int:
    """Ticks that no placement stays below."""
    longest = (table.fixed + table.times[0])[table.allowed[0]].min()
    return int(max(longest, table.fixed.min() + table.work.sum() // table.devices))


def _ticks(parts: list[Part]) -> int:
    return sum(part.placement.ticks for part in parts)


def _close(ticks: int) -> int:
    return ticks + ticks // CLOSE


def _fastest(found: Iterable[list[Part]]) -> list[Part]:
    """Empty where there is none."""
    return min((parts for parts in found if parts), key=_ticks, default=[])


def _step_plan(table: Table, parts: list[Part], costs: Costs) -> StepPlan:
    return StepPlan(
        devices=table.devices,
        micro_batches=tuple(MicroBatch(groups=_groups(table.part(part.rows), part.placement, costs)) for part in parts),
    )


def _groups(table: Table, placement: Placement, costs: Costs) -> tuple[Group, ...]:
    groups = []
    ends = placement.degrees.cumsum().tolist()
    for index, (degree, end) in enumerate(zip(placement.degrees.tolist(), ends, strict=True)):
        own = np.flatnonzero(placement.groups == index)
        group = Group(
            degree=degree,
            first_rank=end - degree,  # largest first: a multiple of the degree
            sequences=tuple(table.ids[own].tolist()),
            tokens=int(table.lengths[own].sum()),
            seconds=costs.seconds(table.lengths[own].tolist(), degree),
        )
        groups.append(group)
    return tuple(groups)


def _infeasible(table: Table, cluster: Cluster, micro_batches: int | None) -> str:
    count = "any number of" if micro_batches is None else f"{micro_batches}"
    fewest = fewest_groups(table.degrees.tolist(), table.devices)
    most = int((table.capacity // table.degrees).max()) * table.devices
    return (
        f"a step must keep every device busy within its memory: for {len(table)} sequences of {table.lengths.sum():,} "
        f"tokens in {count} micro-batches on {cluster} no plan was found; a micro-batch needs {fewest} or more, "
        f"each in a group that holds it, and holds up to {most:,} tokens; take more sequences a step (short ones "
        "beside long ones), another number of micro-batches, or more memory"
    )
