"""Oracle: FlexSP's mixed-integer program of one micro-batch (arXiv:2412.01523, section 4.1, equations 17 to 22).

For every degree d there are N / d virtual groups p. The variables are m_p in {0, 1}, group p exists, and A_qp, the
sequences of bucket q in group p:

    least C with  fixed_p m_p + sum_q t_qp A_qp <= C     sum_q s_q A_qp <= capacity_p m_p     m_p <= sum_q A_qp
                  sum_p A_qp = members of bucket q       sum_p d_p m_p = N

The groups cover all devices and none is empty, as in the paper's code: a rank without a group would keep the others
waiting in collectives over all ranks. Equal virtual groups are ordered, so that solvers need not tell them apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from linear_llama3.sequence_parallel.planner.group_costs import Assignment, CostTable, Integers

BUCKETS = 16
SECONDS = 10.0  # after which the solver returns the best so far


class Solution(NamedTuple):
    assignment: Assignment | None  # None: none exists, or none was found in time
    bound: float  # cost that no assignment of the bucketed lengths stays below, as far as the solver got
    optimal: bool  # proven; of the bucketed lengths
    exact: bool  # every bucket holds sequences of one length only


def solve_milp(table: CostTable, *, buckets: int = BUCKETS, seconds: float = SECONDS) -> Solution:
    """Solve by scipy's HiGHS."""
    from scipy.optimize import Bounds, milp

    starts = _starts(table, buckets)
    count = np.diff(np.append(starts, len(table)))  # [Q]
    kind = np.repeat(np.arange(len(table.degrees)), table.devices // table.degrees)[::-1]  # [P], largest first
    scale = float((table.fixed + table.times.sum(0)).max())  # the solver's tolerances are for numbers near 1
    size, groups = len(starts) * len(kind), len(kind)
    fits = table.lengths[starts][:, None] <= table.capacity[kind]
    upper = np.concatenate([[np.inf], np.ones(groups), (fits * count[:, None]).ravel()])
    result = milp(
        c=np.append(1.0, np.zeros(groups + size)),
        integrality=np.append(0, np.ones(groups + size)),
        bounds=Bounds(0, upper),
        constraints=_constraints(table, starts, count, kind, scale),
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    exact = bool((table.lengths == np.repeat(table.lengths[starts], count)).all())
    bound = (result.mip_dual_bound or 0.0) * scale
    if result.x is None:
        return Solution(None, bound, result.status == 2, exact)
    x = np.rint(result.x).astype(np.int64)
    used = np.flatnonzero(x[1 : groups + 1])
    taken = x[groups + 1 :].reshape(len(starts), groups)[:, used]  # [Q, G]
    return Solution(_assignment(taken, kind[used]), bound, result.status == 0, exact)


def _starts(table: CostTable, buckets: int) -> Integers:
    """First row of every bucket: more of them where rounding would take over half of the memory that is left."""
    room = int((table.capacity // table.degrees).max()) * table.devices - int(table.lengths.sum())
    while True:
        starts = bucket_starts(table.lengths, min(buckets, len(table)))
        rounded = table.lengths[starts] @ np.diff(np.append(starts, len(table)))
        if 2 * (rounded - table.lengths.sum()) <= room or buckets >= len(table):
            return starts
        buckets *= 2


def _constraints(table: CostTable, starts: Integers, count: Integers, kind: Integers, scale: float) -> Any:
    """Variables in the order C, m [P], A [Q, P]."""
    from scipy.optimize import LinearConstraint
    from scipy.sparse import bmat, csr_array, diags_array, eye_array, kron

    one, groups = np.ones((1, len(starts))), len(kind)

    def rows(weights: np.ndarray) -> Any:  # [Q, P] -> sums over the buckets of every group
        return kron(csr_array(one), eye_array(groups)) @ diags_array(weights.ravel().astype(float))

    times, fixed = table.times[starts][:, kind] / scale, table.fixed[kind] / scale
    lengths = np.broadcast_to(table.lengths[starts][:, None], times.shape)
    order = (eye_array(groups) - eye_array(groups, k=1)).tocsr()[:-1][np.diff(kind) == 0]
    nothing = csr_array((groups, 1))
    of_group = bmat(
        [
            [csr_array(-np.ones((groups, 1))), diags_array(fixed), rows(times)],
            [nothing, -diags_array(table.capacity[kind].astype(float)), rows(lengths)],
            [nothing, eye_array(groups), -rows(np.ones_like(times))],
            [csr_array((order.shape[0], 1)), -order, csr_array((order.shape[0], times.size))],
        ],
        format="csr",
    )
    members = bmat(
        [
            [csr_array((len(starts), 1 + groups)), kron(eye_array(len(starts)), np.ones((1, groups)))],
            [csr_array(np.append(0.0, table.degrees[kind])[None]), csr_array((1, times.size))],
        ],
        format="csr",
    )
    exactly = np.append(count, table.devices)
    return [LinearConstraint(of_group, -np.inf, 0), LinearConstraint(members, exactly, exactly)]


def _assignment(taken: Integers, kind: Integers) -> Assignment:
    """taken: sequences of every bucket in every group `[Q, G]`."""
    groups = np.concatenate([np.repeat(np.arange(len(kind)), row) for row in taken])
    return Assignment(np.zeros_like(kind), kind, groups)


def bucket_starts(lengths: Integers, count: int) -> Integers:
    """First positions of `count` consecutive buckets; every length counts as its bucket's longest, its first.

    The least sum of what is added, by dynamic programming: error[q][k] of the first k lengths in q buckets is the
    minimum over j of error[q - 1][j] + (k - j) lengths[j] - sum(lengths[j:k]).

    Args:
        lengths: [K], descending, K >= count.
    """
    sums = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.arange(len(lengths) + 1)
    added = (ends - ends[:-1, None]) * lengths[:, None] - (sums - sums[:-1, None])  # [j, k] of one bucket
    never = np.int64(2**60)
    added[ends <= ends[:-1, None]] = never
    error, choices = np.where(ends == 0, 0, never), []
    for _ in range(count):
        total = np.minimum(error[:-1, None] + added, never)
        choices.append(total.argmin(0))
        error = total.min(0)
    starts, end = [], len(lengths)
    for choice in reversed(choices):
        end = int(choice[end])
        starts.append(end)
    return np.array(starts[::-1])
