"""Plans hold what they promise, and are as fast as the best of all plans."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, pairwise, product
from math import inf
from pathlib import Path

import numpy as np
import pytest

from linear_llama3.sequence_parallel.planner import (
    Cluster,
    Costs,
    DegreeCosts,
    StepPlan,
    aligned_groups,
    lower_bound,
    plan,
    plan_one_degree,
    planner,
    search,
)
from linear_llama3.sequence_parallel.planner.chunks import cut_evenly
from linear_llama3.sequence_parallel.planner.effort import SECONDS, Effort
from linear_llama3.sequence_parallel.planner.group_costs import tabulate
from linear_llama3.sequence_parallel.planner.partitions import partitions
from tests.helpers.planner_cases import Case, fastest, fits, random_case, seconds
from tests.helpers.planner_quality import DEVICES, slower_than_best

FREE = DegreeCosts(fixed=1, per_token=1, per_square=0, fixed_bytes=0, bytes_per_token=1)
ROOT = Path(__file__).parents[3]
SIZES = [(1, 1), (1, 12), (2, 30), (3, 9), (4, 4), (6, 25), (8, 7), (8, 60), (12, 40), (16, 50), (64, 80), (128, 150)]


def check(case: Case, step: StepPlan) -> None:
    """Every promise of a plan, by definition."""
    lengths, cluster, costs = case
    groups = [group for batch in step.micro_batches for group in batch.groups]
    assert sorted(n for group in groups for n in group.sequences) == list(range(len(lengths)))
    for batch in step.micro_batches:
        degrees = [group.degree for group in batch.groups]
        assert sum(degrees) == cluster.devices
        assert degrees == sorted(degrees, reverse=True)
        assert [rank for group in batch.groups for rank in group.ranks] == list(range(cluster.devices))
        assert batch.seconds == max(group.seconds for group in batch.groups)
    for group in groups:
        own = [lengths[n] for n in group.sequences]
        assert own == sorted(own, reverse=True)
        assert own, "a group has no sequence"
        assert group.degree.bit_count() == 1
        assert group.first_rank % group.degree == 0
        assert group.degree == 1 or (group.degree, group.first_rank) in aligned_groups(cluster.devices)
        assert group.tokens == sum(own)
        assert fits(own, group.degree, cluster, costs)
        assert group.seconds == pytest.approx(seconds(own, group.degree, costs))
    assert step.seconds == pytest.approx(sum(max(g.seconds for g in b.groups) for b in step.micro_batches))
    for rank in range(cluster.devices):
        assert [rank in group.ranks for group in step.for_rank(rank)] == [True] * len(step.micro_batches)


def planned(case: Case, **options: int) -> StepPlan | None:
    try:
        return plan(*case, **options)
    except ValueError as error:
        assert "no plan was found" in str(error)
        return None


@pytest.mark.parametrize(("devices", "sequences"), SIZES)
def test_promises(devices: int, sequences: int) -> None:
    found = 0
    for seed in range(8):
        case = random_case(seed, sequences=sequences, devices=devices)
        step = planned(case)
        if step is not None:
            found += 1
            check(case, step)
            assert step.seconds >= lower_bound(*case) * (1 - 1e-9)
            count = len(step.micro_batches)
            if (more := planned(case, micro_batches=count + 1)) is not None:
                check(case, more)
                assert len(more.micro_batches) == count + 1
    assert found >= 6


@pytest.mark.parametrize(("devices", "sequences"), SIZES)
def test_never_slower_than_one_degree(devices: int, sequences: int) -> None:
    for seed in range(8):
        case = random_case(seed, sequences=sequences, devices=devices)
        step = planned(case)
        for degree in [None, *case[2].by_degree]:
            one = plan_one_degree(*case, degree=degree)
            if one is not None:
                check(case, one)
                assert {g.degree for b in one.micro_batches for g in b.groups} == {
                    degree or one.micro_batches[0].groups[0].degree
                }
                assert step is not None
                assert step.seconds <= one.seconds * (1 + 1e-9)


def test_plans_are_found_where_memory_is_nearly_all_needed() -> None:
    """Every micro-batch of three devices needs one of the long sequences and one of the short ones."""
    costs = Costs(by_degree={d: replace(FREE, bytes_per_token=1 / d) for d in (1, 2)})
    for count in range(1, 9):
        case = [150] * count + [50] * count, Cluster(devices=3, memory=100), costs
        step = plan(*case)
        check(case, step)
        assert str(step) == " ".join(["<2, 1>"] * len(step.micro_batches))
    # 17 sequences fill 99 % of six groups, which no rule that takes the longest first manages
    lengths = [57, 43, 51, 49, 62, 38, 70, 30, 66, 34, 45, 35, 19, 41, 28, 20, 10]
    case = lengths, Cluster(devices=7, memory=100), Costs(by_degree={1: FREE})
    step = plan(*case)
    check(case, step)
    assert len(step.micro_batches) == 1


@pytest.mark.parametrize("devices", [64, 256])
def test_planning_stops_when_its_effort_is_spent(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, as every rank counts; where nothing bounded it, such steps took minutes."""
    rng, efforts = np.random.default_rng(0), []
    costs = Costs(by_degree={d: replace(FREE, fixed=d, bytes_per_token=1 / d) for d in (1, 2, 4, 8, 16, 32, 64)})
    cluster = Cluster(devices=devices, memory=1000)
    monkeypatch.setattr(Effort, "of_step", lambda devices: efforts.append(Effort(SECONDS)) or efforts[-1])
    for lengths in (rng.integers(12800, 16000, 512), rng.integers(1, 8000, 512), rng.lognormal(6, 1.5, 512) + 1):
        case = lengths.astype(int).clip(max=64000).tolist(), cluster, costs
        check(case, plan(*case))
        assert efforts[-1].left > -SECONDS / 2


def simple_one_degree(case: Case) -> float:
    """Seconds of a plain plan of one degree: longest first, then the slowest groups together; best of all degrees."""
    lengths, cluster, costs = case
    best = inf
    for degree in costs.by_degree:
        groups, rest = divmod(cluster.devices, degree)
        for count in range(1, 12):
            held: list[list[int]] = [[] for _ in range(groups * count)]
            for s in sorted(lengths, reverse=True):
                open_ = [own for own in held if fits([*own, s], degree, cluster, costs)]
                if not open_:
                    break
                min(open_, key=lambda own: seconds([*own, s], degree, costs)).append(s)
            else:
                if all(held) and not rest:
                    each = sorted((seconds(own, degree, costs) for own in held), reverse=True)
                    best = min(best, sum(each[::groups]))
    return best


@pytest.mark.parametrize(("devices", "sequences"), [(2, 30), (4, 20), (8, 60), (16, 70)])
def test_never_slower_than_a_plain_plan_of_one_degree(devices: int, sequences: int) -> None:
    plain = 0
    for seed in range(8):
        case = random_case(seed, sequences=sequences, devices=devices)
        if (one := simple_one_degree(case)) < inf:
            plain += 1
            assert plan(*case).seconds <= one * (1 + 1e-9)
    assert plain >= 4


@pytest.mark.parametrize(("devices", "sequences", "cases"), [(2, 5, 10), (3, 4, 10), (4, 5, 12), (6, 5, 5), (8, 6, 3)])
def test_few_sequences_are_planned_best(devices: int, sequences: int, cases: int) -> None:
    """The whole step, any number of micro-batches and one."""
    for seed in range(cases):
        case = random_case(100 + seed, sequences=sequences, devices=devices)
        for count in (None, 1, 2):
            best, step = fastest(case, micro_batches=count), planned(case, micro_batches=count)
            assert (best == inf) == (step is None)
            if step is not None:
                check(case, step)
                assert step.seconds == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("devices", "sequences", "cases"), [(2, 6, 20), (4, 6, 12), (8, 5, 10)])
def test_enumeration_is_within_two_percent(
    devices: int, sequences: int, cases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What plans more sequences, on few: a micro-batch is within 2 % of the best."""
    for module in (planner, search):
        monkeypatch.setattr(module, "FEW", 0)
    ratios = []
    for seed in range(cases):
        case = random_case(200 + seed, sequences=sequences, devices=devices, tightest=1.4)
        best, step = fastest(case, micro_batches=1), planned(case, micro_batches=1)
        assert (best == inf) == (step is None)
        if step is not None:
            check(case, step)
            ratios.append(step.seconds / best)
    assert len(ratios) >= cases / 2
    assert max(ratios) <= 1.02
    assert np.mean(ratios) <= 1.002


@pytest.mark.parametrize("devices", DEVICES)
def test_a_few_more_sequences_are_planned_almost_best(devices: int) -> None:
    """Whole steps, most of them of several micro-batches, against all plans; a plan is found wherever there is one."""
    cases = [random_case(300 + seed, sequences=planner.FEW + 1, devices=devices) for seed in range(12)]
    ratios = sorted(ratio for case in cases if (ratio := slower_than_best(case)) is not None)
    assert len(ratios) >= 10
    assert ratios[-2] <= 1.02
    assert ratios[-1] <= 1.05


@pytest.mark.parametrize("seed", range(6))
def test_bounds_of_partitions_hold(seed: int) -> None:
    """No assignment is faster than the bound by which a partition is left out."""
    table = tabulate(*random_case(seed, sequences=5, devices=4))
    options, bounds = search.candidates(table)
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
    """Where fixed times dominate: the weighted mean of 2,800 and 1,400 groups, by Python's integers."""
    costs = {d: replace(FREE, fixed=1000, per_token=1e-9 / d**0.5) for d in (1, 2)}
    table = tabulate([100] * 6000, Cluster(devices=4, memory=1e6), Costs(by_degree=costs))
    option, every = [2800, 1400], [sum(column) for column in table.times.T.tolist()]
    weights = [min(every) * search.WEIGHT // total for total in every]
    least = [min(w * t for w, t in zip(weights, row, strict=True)) for row in table.times.tolist()]
    fixed = sum(n * w * f for n, w, f in zip(option, weights, table.fixed.tolist(), strict=True))
    exactly = -(-(fixed + sum(least)) // sum(n * w for n, w in zip(option, weights, strict=True)))
    assert search.lower_bounds(table, np.array([option]))[0] >= exactly


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


@pytest.mark.parametrize("seed", range(20))
def test_cuts_are_even(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.lognormal(3, 1, rng.integers(1, 9)).astype(int) + 1)[::-1]
    for count in range(1, len(lengths) + 1):
        cuts = cut_evenly(lengths, count)
        assert [cut.start for cut in cuts] + [len(lengths)] == [0] + [cut.stop for cut in cuts]
        assert all(cut.stop > cut.start for cut in cuts)
        options = combinations(range(1, len(lengths)), count - 1)
        best = min(max(sum(lengths[a:b]) for a, b in pairwise([0, *o, len(lengths)])) for o in options)
        assert max(lengths[cut].sum() for cut in cuts) == best


WITHOUT_TORCH = """
import sys, types
for name in ("linear_llama3", "linear_llama3.sequence_parallel"):  # the packages without their own imports
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name.replace(".", "/")]
for name in ("torch", "transformers", "scipy"):
    sys.modules[name] = None  # an import of it fails
from linear_llama3.sequence_parallel.planner import Cluster, load_profile, model_costs, plan
from linear_llama3.sequence_parallel.planner import report
from linear_llama3.sequence_parallel.planner.lengths import read_lengths
profile = load_profile("flexsp-gpt-7b-a100")
costs = model_costs(profile, 16, model=profile.model.with_softmax_every(4))
print(plan(read_lengths("wikipedia", 200).tolist(), Cluster(devices=16, memory=profile.bytes.device), costs))
"""


def test_every_process_makes_the_same_plan_without_torch() -> None:
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": seed}
        run = [sys.executable, "-c", WITHOUT_TORCH]
        done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert outputs.pop().startswith("<")


@pytest.mark.parametrize(("devices", "sequences"), [(4, 6), (8, 40), (64, 100)])
def test_the_order_of_lengths_changes_nothing(devices: int, sequences: int) -> None:
    lengths, cluster, costs = random_case(3, sequences=sequences, devices=devices)
    order = np.random.default_rng(0).permutation(sequences)
    one, other = plan(lengths, cluster, costs), plan([lengths[n] for n in order], cluster, costs)
    assert one == plan(lengths, cluster, costs)
    for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
        for g, h in zip(a.groups, b.groups, strict=True):
            assert (g.degree, g.first_rank, g.seconds) == (h.degree, h.first_rank, h.seconds)
            assert [lengths[n] for n in g.sequences] == [lengths[order[n]] for n in h.sequences]


def test_what_cannot_be_planned_is_said() -> None:
    one = Costs(by_degree={1: FREE})
    cluster = Cluster(devices=2, memory=100)
    with pytest.raises(ValueError, match=r"got one of 101 tokens: .* 1 devices hold 100 tokens"):
        plan([5, 101], cluster, one)
    with pytest.raises(ValueError, match=r"keep every device busy .* needs 2 or more, .* up to 200 tokens"):
        plan([5], cluster, one)
    with pytest.raises(ValueError, match="in 1 micro-batches"):
        plan([90, 90, 90, 90], cluster, one, micro_batches=1)
    with pytest.raises(ValueError, match="one or more positive integers, got"):
        plan([], cluster, one)
    with pytest.raises(ValueError, match="one or more positive integers, got"):
        plan([3, 0], cluster, one)
    with pytest.raises(ValueError, match=r"one or more positive integers, got \[1.5"):
        plan([1.5, 2.0], cluster, one)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="one or more micro_batches, got 0"):
        plan([3, 4], cluster, one, micro_batches=0)
    with pytest.raises(ValueError, match="solver must be one of"):
        plan([3, 4], cluster, one, solver="simplex")
    with pytest.raises(ValueError, match=r"no larger than the 2 devices, got \[4\]"):
        plan([3, 4], cluster, Costs(by_degree={4: FREE}))
    with pytest.raises(ValueError, match=r"powers of two, got \[3\]"):
        Costs(by_degree={3: FREE})
    with pytest.raises(ValueError, match="devices of a cluster must be positive, got 0"):
        Cluster(devices=0, memory=1)
    assert plan_one_degree([5], cluster, one) is None


def test_text_of_a_plan() -> None:
    slow = Costs(by_degree={1: FREE, 2: replace(FREE, per_token=0.5)})
    assert str(plan([100, 30, 20, 10], Cluster(devices=4, memory=110), slow, micro_batches=1)) == "<2, 1 x 2>"
