"""FlexSP's mixed-integer program as an oracle, and the planner against its proven optima."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest

from linear_llama3.sequence_parallel.planner import Cluster, Costs, DegreeCosts
from linear_llama3.sequence_parallel.planner.group_costs import tabulate
from tests.helpers.planner_cases import Case, random_case, seconds
from tests.helpers.planner_exact import exact_cost
from tests.helpers.planner_milp import bucket_starts, solve_milp
from tests.sequence_parallel.planner.test_plan import planned

pytest.importorskip("scipy")


@pytest.mark.parametrize("seed", range(2))
def test_buckets_round_least(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(1, 60, 9))[::-1]
    for count in range(1, len(lengths) + 1):

        def added(edges: list[int]) -> int:
            return sum(int((lengths[a] - lengths[a:b]).sum()) for a, b in pairwise(edges))

        starts = bucket_starts(lengths, count).tolist()
        assert len(set(starts)) == count
        options = combinations(range(1, len(lengths)), count - 1)
        assert added([*starts, len(lengths)]) == min(added([0, *option, len(lengths)]) for option in options)


@pytest.mark.parametrize("devices", [2, pytest.param(8, marks=pytest.mark.slow)], ids="N{}-K5".format)
def test_the_program_equals_the_exact_oracle(devices: int) -> None:
    for seed in range(4):
        table = tabulate(*random_case(300 + seed, sequences=5, devices=devices))
        best, solution = exact_cost(table, 1), solve_milp(table)
        assert solution.optimal
        assert solution.exact
        assert (solution.assignment is None) == (best is None)
        if solution.assignment is not None:
            assert solution.assignment.cost(table) == pytest.approx(best, rel=1e-5)
            assert solution.bound == pytest.approx(best, rel=1e-5)


def few_lengths(seed: int, devices: int) -> Case:
    """More sequences than are planned exactly, of four lengths: a small program, and no rounding."""
    lengths, cluster, costs = random_case(seed, sequences=16, devices=devices, tightest=1.5)
    rng = np.random.default_rng(seed)
    chosen = np.sort(lengths)[rng.integers(0, 4, 14) * 5]
    return chosen.tolist(), replace(cluster, memory=cluster.memory * rng.uniform(1, 2)), costs


@pytest.mark.parametrize(
    ("devices", "cases"),
    [(2, 4), *(pytest.param(devices, 8, marks=pytest.mark.slow) for devices in (4, 8))],
    ids=["N2-K14", "N4-K14", "N8-K14"],
)
def test_the_planner_is_within_two_percent_of_a_proven_optimum(devices: int, cases: int) -> None:
    proven = 0
    for seed in range(cases):
        case = few_lengths(400 + seed, devices)
        table = tabulate(*case)
        solution, step = solve_milp(table, seconds=2), planned(case, micro_batches=1)
        assert solution.exact
        assert not (solution.optimal and solution.assignment is None and step is not None)
        if solution.optimal and solution.assignment is not None:
            assert step is not None
            (batch,) = step.micro_batches
            unit = seconds(case[0], 1, case[2]) / int(table.fixed[0] + table.times[:, 0].sum())
            assert 1 - 1e-5 <= batch.seconds / (solution.assignment.cost(table) * unit) <= 1.02
            proven += 1
    assert proven >= cases / 2


@pytest.mark.slow
def test_many_lengths_are_rounded_up_to_buckets() -> None:
    case = random_case(5, sequences=40, devices=4)
    table = tabulate(*case)
    solution = solve_milp(table, seconds=2)
    assert not solution.exact
    assert solution.assignment is not None
    _, kind, groups = solution.assignment
    assert len(groups) == 40
    assert table.degrees[kind].sum() == 4
    for group, column in enumerate(kind):
        assert 0 < table.lengths[groups == group].sum() <= table.capacity[column]


def test_buckets_do_not_round_out_of_memory() -> None:
    """Two devices are filled to the last token: with two buckets nothing would fit."""
    cost = DegreeCosts(fixed=1, per_token=1, per_square=0, fixed_bytes=0, bytes_per_token=1)
    table = tabulate([30, 25, 5, 29, 20, 11], Cluster(devices=2, memory=60), Costs(by_degree={1: cost}))
    solution = solve_milp(table, buckets=2)
    assert solution.assignment is not None
    assert solution.assignment.cost(table) == int(table.fixed[0] + table.times[:, 0].sum() // 2)
