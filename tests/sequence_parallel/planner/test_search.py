"""The steps of the search, by plain loops and against exact oracles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise, product
from math import inf

import numpy as np
import pytest

from linear_llama3.sequence_parallel.planner import Cluster, Costs, DegreeCosts
from linear_llama3.sequence_parallel.planner.exact import EXACT, Slot, fill
from linear_llama3.sequence_parallel.planner.group_costs import Assignment, CostTable, tabulate
from linear_llama3.sequence_parallel.planner.partitions import (
    BOUND_WEIGHTS,
    IMPOSSIBLE,
    candidates,
    least_repeats,
    lower_bounds,
    partitions,
)
from linear_llama3.sequence_parallel.planner.replan import replan
from linear_llama3.sequence_parallel.planner.search import (
    RULES,
    Rule,
    cut_evenly,
    group_kinds,
    local_search,
    longest_first,
)
from tests.helpers.planner_cases import fastest, random_case
from tests.helpers.planner_exact import exact_cost
from tests.helpers.planner_quality import slower_than_best
from tests.sequence_parallel.planner.test_plan import FREE, check, planned

Score = Callable[[int, int, int], float]  # of a group's cost and room afterwards and its capacity: the least wins
SCORES: tuple[Score, ...] = (
    lambda cost, room, capacity: cost,
    lambda cost, room, capacity: -room / capacity,
    lambda cost, room, capacity: room,
)


def plainly(table: CostTable, degrees: list[int], score: Score) -> list[int] | None:
    kind = [table.degrees.tolist().index(degree) for degree in degrees]
    load, room = [int(table.fixed[k]) for k in kind], [int(table.capacity[k]) for k in kind]
    chosen: list[int] = []
    for n, length in enumerate(table.lengths.tolist()):
        empty = set(range(len(kind))) - set(chosen)
        allowed = empty if len(empty) >= len(table) - n else range(len(kind))
        fits = [g for g in sorted(allowed) if room[g] >= length]
        if not fits:
            return None
        best = min(
            fits,
            key=lambda g: score(load[g] + table.times[n, kind[g]], room[g] - length, int(table.capacity[kind[g]])),
        )
        load[best] += table.times[n, kind[best]]
        room[best] -= length
        chosen.append(best)
    return chosen if len(set(chosen)) == len(kind) else None


@pytest.mark.parametrize(("rule", "score"), zip(RULES, SCORES, strict=True), ids=["finish", "fill", "best-fit"])
def test_longest_first_equals_a_plain_loop(rule: Rule, score: Score) -> None:
    placed = 0
    for seed in range(20):
        table = tabulate(*random_case(seed, sequences=12, devices=8))
        options = partitions(8, tuple(table.degrees.tolist()))
        costs, chosen = longest_first(table, options, rule)
        for option, slowest, groups in zip(options, costs, chosen, strict=True):
            degrees = np.repeat(table.degrees, option)[::-1].tolist()
            expected = plainly(table, degrees, score)
            assert (slowest < IMPOSSIBLE) == (expected is not None)
            if expected is not None:
                placed += 1
                assert groups.tolist() == expected
    assert placed > 40


@pytest.mark.parametrize("devices", [3, 4, 8], ids="N{}".format)
def test_least_repeats_is_a_bound(devices: int) -> None:
    for seed in range(10):
        table = tabulate(*random_case(seed, sequences=14, devices=devices))
        options = partitions(devices, tuple(table.degrees.tolist()))
        least = least_repeats(table, options)
        for count in (1, 2, 3):
            for rule in RULES:
                costs, _ = longest_first(table, options * count, rule)
                assert (least[costs < IMPOSSIBLE] <= count).all()


def test_local_search_exceeds_no_memory() -> None:
    """The only change that saves time would fill a group of 10 tokens with 11."""
    square = DegreeCosts(fixed=0, per_token=0, per_square=1, fixed_bytes=0, bytes_per_token=1)
    for memory, expected in ((10, [[3, 6], [4, 4]]), (11, [[3, 4, 4], [6]])):
        table = tabulate([6, 4, 4, 3], Cluster(devices=2, memory=memory), Costs(by_degree={1: square}))
        start = Assignment(np.array([0, 0]), np.array([0, 0]), np.array([0, 1, 1, 0]))
        found = local_search(table, start)
        held = [sorted(table.lengths[found.group == group].tolist()) for group in (0, 1)]
        assert sorted(held) == expected
        loads = [sum(s * s for s in own) for own in held]
        assert found.cost(table) == pytest.approx(max(loads) * table.times[0, 0] / 36, rel=1e-6)


def test_local_search_improves_poor_plans() -> None:
    """Never worse, within memory, no group empty; between micro-batches too."""
    better = 0
    for seed in range(8):
        table = tabulate(*random_case(seed, sequences=16, devices=4))
        options = 2 * partitions(4, tuple(table.degrees.tolist()))
        options = options[options.sum(1) <= 16]
        placed = [longest_first(table, options, rule) for rule in RULES]
        costs, groups = (np.concatenate(arrays) for arrays in zip(*placed, strict=True))
        options = np.concatenate([options] * len(RULES))
        for row in np.flatnonzero(costs < IMPOSSIBLE):
            kind = group_kinds(options[row])
            before = Assignment(np.arange(len(kind)) % 2, kind, groups[row])
            after = local_search(table, before)
            assert after.cost(table) <= before.cost(table)
            assert set(after.group.tolist()) == set(range(len(kind)))
            tokens = np.bincount(after.group, weights=table.lengths)
            assert (tokens <= table.capacity[kind]).all()
            better += after.cost(table) < before.cost(table)
    assert better >= 10


@pytest.mark.parametrize("seed", range(3))
def test_lower_bounds_hold_for_every_assignment(seed: int) -> None:
    table = tabulate(*random_case(seed, sequences=5, devices=4))
    options, bounds = candidates(table)
    kinds = [np.repeat(np.arange(len(option)), option) for option in options]
    for kind, bound in zip(kinds, bounds, strict=True):
        for chosen in product(range(len(kind)), repeat=len(table)):
            load, tokens = table.fixed[kind], np.zeros(len(kind), dtype=int)
            for row, group in enumerate(chosen):
                load[group] += table.times[row, kind[group]]
                tokens[group] += table.lengths[row]
            if (tokens <= table.capacity[kind]).all() and len(set(chosen)) == len(kind):
                assert load.max() >= bound


def test_bounds_of_thousands_of_groups_do_not_overflow() -> None:
    """Fixed times dominate here: the weighted mean of 2,800 and 1,400 groups, by Python's integers."""
    costs = {d: replace(FREE, fixed=1000, per_token=1e-9 / d**0.5) for d in (1, 2)}
    table = tabulate([100] * 6000, Cluster(devices=4, memory=1e6), Costs(by_degree=costs))
    option, every = [2800, 1400], [sum(column) for column in table.times.T.tolist()]
    weights = [min(every) * BOUND_WEIGHTS // total for total in every]
    least = [min(w * t for w, t in zip(weights, row, strict=True)) for row in table.times.tolist()]
    fixed = sum(n * w * f for n, w, f in zip(option, weights, table.fixed.tolist(), strict=True))
    exactly = -(-(fixed + sum(least)) // sum(n * w for n, w in zip(option, weights, strict=True)))
    assert lower_bounds(table, np.array([option]))[0] >= exactly


def test_partitions_are_all_partitions() -> None:
    """Counts by a recurrence in the literature (OEIS A018819, partitions into powers of two), and of few degrees."""
    for devices, count in ((4, 4), (8, 10), (16, 36), (32, 202), (64, 1828)):
        found = partitions(devices, tuple(1 << bit for bit in range(devices.bit_length())))
        assert len(np.unique(found, axis=0)) == len(found) == count
        assert (found @ (1 << np.arange(found.shape[1])) == devices).all()
    for devices, degrees, count in ((128, 3, 3058), (256, 3, 13113), (2048, 2, 4029)):
        found = partitions(devices, tuple(1 << bit for bit in range(devices.bit_length())))
        assert len(np.unique(found, axis=0)) == len(found) == count
        assert ((found > 0).sum(1) <= degrees).all()


def test_cuts_are_even() -> None:
    """The largest part is the smallest possible, by all ways to cut."""
    rng = np.random.default_rng(0)
    every = [np.sort(rng.lognormal(3, 1, rng.integers(1, 9)).astype(int) + 1)[::-1] for _ in range(20)]
    for lengths, count in [(own, count) for own in every for count in range(1, len(own) + 1)]:
        cuts = cut_evenly(lengths, count)
        assert [cut.start for cut in cuts] + [len(lengths)] == [0] + [cut.stop for cut in cuts]
        assert all(cut.stop > cut.start for cut in cuts)
        options = combinations(range(1, len(lengths)), count - 1)
        best = min(max(sum(lengths[a:b]) for a, b in pairwise([0, *o, len(lengths)])) for o in options)
        assert max(lengths[cut].sum() for cut in cuts) == best


@pytest.mark.parametrize(
    ("devices", "sequences", "cases"),
    [
        (2, 5, 4),
        (4, 4, 4),
        pytest.param(6, 5, 4, marks=pytest.mark.slow),
        pytest.param(8, 6, 3, marks=pytest.mark.slow),
    ],
    ids=["N2-K5", "N4-K4", "N6-K5", "N8-K6"],
)
def test_the_exact_oracle_equals_plain_enumeration(devices: int, sequences: int, cases: int) -> None:
    for seed in range(cases):
        case = random_case(100 + seed, sequences=sequences, devices=devices)
        lengths, _, costs = case
        table = tabulate(*case)
        unit = sum(costs.by_degree[1].per_token * s + costs.by_degree[1].per_square * s**2 for s in lengths)
        unit /= int(table.times[:, 0].sum())
        for count in (None, 1, 2):
            best, found = fastest(case, micro_batches=count), exact_cost(table, count)
            assert (best == inf) == (found is None)
            if found is not None:
                assert found * unit == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    ("devices", "sequences"),
    [(2, 8), (3, 9), (4, 8), *(pytest.param(n, 11, marks=pytest.mark.slow) for n in (2, 3, 4, 6, 8))],
    ids=["N2-K8", "N3-K9", "N4-K8", *(f"N{n}-K11" for n in (2, 3, 4, 6, 8))],
)
def test_few_sequences_are_planned_exactly(devices: int, sequences: int) -> None:
    """Complete steps, most of them of several micro-batches; a plan is found wherever there is one."""
    cases = [random_case(300 + seed, sequences=sequences, devices=devices) for seed in range(12)]
    ratios = [ratio for case in cases if (ratio := slower_than_best(case)) is not None]
    assert len(ratios) >= 10
    assert ratios == [1] * len(ratios)


@pytest.mark.parametrize(
    ("devices", "sequences", "cases"),
    [(4, 12, 4), *(pytest.param(n, 12, 12, marks=pytest.mark.slow) for n in (2, 3, 4, 6, 8))],
    ids=["N4-K12-4", *(f"N{n}-K12" for n in (2, 3, 4, 6, 8))],
)
def test_small_steps_are_near_the_exact_optimum(devices: int, sequences: int, cases: int) -> None:
    assert sequences > EXACT
    ratios = [slower_than_best(random_case(300 + n, sequences=sequences, devices=devices)) for n in range(cases)]
    known = [ratio for ratio in ratios if ratio is not None]
    assert len(known) >= cases - 2
    assert np.median(known) <= 1.001
    assert np.mean(known) <= 1.005


@pytest.mark.parametrize("optional", [False, True], ids=["both", "one-may-be-empty"])
def test_slots_wait_for_their_other_groups(optional: bool) -> None:
    """The least sum over both slots, by all assignments to all groups of one and two devices."""
    for seed in range(6):
        table = tabulate(*random_case(seed, sequences=5, devices=4))
        floor = int(table.fixed[0] + table.times[:2, 0].sum())
        slots = [Slot(2, floor), Slot(3, 0, optional)]
        costs = []
        for first, second in product(([1], [0, 0]), ([1, 0], [0, 0, 0])):
            kind = np.array(first + second)
            for groups in product(range(len(kind)), repeat=5):
                held = np.bincount(groups, minlength=len(kind))
                alone = optional and not held[len(first) :].any()
                load = Assignment(kind, kind, np.array(groups)).loads(table)
                tokens = np.bincount(groups, weights=table.lengths, minlength=len(kind))
                if (tokens <= table.capacity[kind]).all() and held[: len(first) if alone else None].all():
                    last = 0 if alone else load[len(first) :].max()
                    costs.append(max(load[: len(first)].max(), floor) + last)
        found = fill(table, np.arange(5), slots)
        assert (found is None) == (not costs)
        if found is not None:
            load = found.loads(table)
            slowest = [int(load[found.micro_batch == n].max(initial=0)) for n in (0, 1)]
            assert max(slowest[0], floor) + slowest[1] == min(costs)


@pytest.mark.parametrize("fixed", [None, 3], ids=["any", "M3"])
def test_micro_batches_are_planned_again(fixed: int | None) -> None:
    """Never worse, within memory, no group empty, all devices used; their number stays where it is given."""
    better, counts = 0, set()
    for seed in range(6):
        table = tabulate(*random_case(seed, sequences=16, devices=4))
        options = 3 * partitions(4, tuple(table.degrees.tolist()))
        options = options[options.sum(1) <= 16]
        costs, groups = longest_first(table, options, RULES[1])
        for row in np.flatnonzero(costs < IMPOSSIBLE):
            kind = group_kinds(options[row])
            micro_batch = np.concatenate([np.repeat(np.arange(3), count // 3) for count in options[row][::-1]])
            before = Assignment(micro_batch, kind, groups[row])
            after = replan(table, before, fixed)
            assert after.cost(table) <= before.cost(table)
            assert set(after.group.tolist()) == set(range(len(after.kind)))
            tokens = np.bincount(after.group, weights=table.lengths)
            assert (tokens <= table.capacity[after.kind]).all()
            devices = np.bincount(after.micro_batch, weights=table.degrees[after.kind])
            assert (devices == 4).all()
            counts.add(len(devices))
            better += after.cost(table) < before.cost(table)
    assert better >= 10
    assert counts == {3} if fixed else len(counts) > 1


@pytest.mark.parametrize(
    ("devices", "sequences"),
    [(2, 6), (4, 6), pytest.param(8, 5, marks=pytest.mark.slow)],
    ids=["N2-K6", "N4-K6", "N8-K5"],
)
def test_one_micro_batch_is_within_two_percent_of_the_optimum(devices: int, sequences: int) -> None:
    ratios = []
    for seed in range(10):
        case = random_case(200 + seed, sequences=sequences, devices=devices, tightest=1.4)
        best, step = fastest(case, micro_batches=1), planned(case, micro_batches=1)
        assert (best == inf) == (step is None)
        if step is not None:
            check(case, step)
            ratios.append(step.seconds / best)
    assert len(ratios) >= 5
    assert max(ratios) <= 1.02
    assert np.mean(ratios) <= 1.003
