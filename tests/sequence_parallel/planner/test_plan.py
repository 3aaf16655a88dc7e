"""Plans keep their promises, and are never slower than plans of one degree."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from math import inf
from typing import Any

import numpy as np
import pytest

from linear_llama3.sequence_parallel.planner import (
    Cluster,
    Costs,
    DegreeCosts,
    StepPlan,
    aligned_groups,
    fewest_groups,
    lower_bound,
    plan,
    plan_one_degree,
    search,
)
from linear_llama3.sequence_parallel.planner.group_costs import CostTable, bytes_text
from linear_llama3.sequence_parallel.planner.partitions import partitions
from tests.helpers.planner_cases import Case, fits, random_case, seconds

FREE = DegreeCosts(fixed=1, per_token=1, per_square=0, fixed_bytes=0, bytes_per_token=1)
SIZES = [(1, 12), (3, 9), (6, 25), (8, 60), (16, 50), (64, 80)]
MORE_SIZES = [(1, 1), (2, 30), (4, 4), (4, 20), (8, 7), (12, 40), (16, 70), (128, 150)]


def sizes() -> pytest.MarkDecorator:
    cases = [pytest.param(*size, id=f"N{size[0]}-K{size[1]}") for size in SIZES]
    cases += [pytest.param(*size, id=f"N{size[0]}-K{size[1]}", marks=pytest.mark.slow) for size in MORE_SIZES]
    return pytest.mark.parametrize(("devices", "sequences"), cases)


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


def planned(case: Case, **options: Any) -> StepPlan | None:
    try:
        return plan(*case, **options)
    except ValueError as error:
        assert "no plan was found" in str(error)
        return None


def short_sequences(seed: int) -> tuple[Case, int | None]:
    """Slightly more sequences than groups, most of them of equal length, on any number of devices, in tight memory."""
    rng = np.random.default_rng(seed)
    devices = int(rng.choice([3, 5, 6, 7]))
    lengths = [1] * 20 if seed % 2 else rng.integers(1, 20, int(rng.integers(12, 24))).tolist()
    degrees = [degree for degree in (1, 2, 4) if degree <= devices and (degree == 1 or rng.random() < 0.6)]
    costs = {
        degree: DegreeCosts(
            fixed=float(rng.random()), per_token=float(rng.random() / degree), per_square=0.0, fixed_bytes=1.0,
            bytes_per_token=1 / degree,
        )
        for degree in degrees
    }  # fmt: skip
    memory = float(rng.choice([max(lengths) + 2, 60, 300]))
    return (lengths, Cluster(devices=devices, memory=memory), Costs(by_degree=costs)), [None, 1, 2, 3][seed % 4]


def test_no_group_is_empty_or_too_full_where_groups_are_hard_to_fill() -> None:
    found = 0
    for seed in range(80):
        case, count = short_sequences(seed)
        step = planned(case, micro_batches=count)
        if step is not None:
            found += 1
            check(case, step)
    assert found > 40


def test_short_sequences_fill_slow_groups_too() -> None:
    """No rule of placing keeps a sequence back for the group that is slowest for all of them."""
    one = DegreeCosts(fixed=0.7, per_token=0.9, per_square=0.0, fixed_bytes=1.0, bytes_per_token=1.0)
    costs = Costs(by_degree={1: one, 4: replace(one, fixed=0.6, per_token=0.09, bytes_per_token=0.25)})
    case = [1] * 20, Cluster(devices=7, memory=301), costs
    step = plan(*case, micro_batches=3)
    check(case, step)
    assert len(step.micro_batches) == 3


@sizes()
def test_every_plan_is_valid(devices: int, sequences: int) -> None:
    found = 0
    for seed in range(5):
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
    assert found >= 4


@sizes()
def test_no_plan_is_slower_than_one_degree(devices: int, sequences: int) -> None:
    for seed in range(5):
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


@pytest.mark.parametrize("devices", [64, pytest.param(256, marks=pytest.mark.slow)], ids="N{}".format)
def test_the_search_is_bounded(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Placed cells are counted, so that every rank stops at the same place; unbounded, such steps took minutes."""
    rng, placed = np.random.default_rng(0), []
    costs = Costs(by_degree={d: replace(FREE, fixed=d, bytes_per_token=1 / d) for d in (1, 2, 4, 8, 16, 32, 64)})
    cluster, place = Cluster(devices=devices, memory=1000), search.place

    def counted(table: CostTable, options: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        placed.append(len(table) * int(options.sum(1).max()) * len(options))
        return place(table, options)

    monkeypatch.setattr(search, "place", counted)
    for lengths in (rng.integers(12800, 16000, 256), rng.lognormal(6, 1.5, 256) + 1):
        case = lengths.astype(int).clip(max=64000).tolist(), cluster, costs
        placed.clear()
        check(case, plan(*case))
        assert sum(placed) <= 3 * search.CELLS_PER_DEVICE * devices


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


@pytest.mark.parametrize(("devices", "sequences"), [(4, 20), (8, 60)], ids=["N4-K20", "N8-K60"])
def test_no_plan_is_slower_than_a_plain_plan_of_one_degree(devices: int, sequences: int) -> None:
    plain = 0
    for seed in range(6):
        case = random_case(seed, sequences=sequences, devices=devices)
        if (one := simple_one_degree(case)) < inf:
            plain += 1
            assert plan(*case).seconds <= one * (1 + 1e-9)
    assert plain >= 3


@pytest.mark.parametrize(("devices", "sequences"), [(4, 6), (8, 40), (64, 100)], ids=["N4-K6", "N8-K40", "N64-K100"])
def test_the_order_of_lengths_changes_nothing(devices: int, sequences: int) -> None:
    lengths, cluster, costs = random_case(3, sequences=sequences, devices=devices)
    order = np.random.default_rng(0).permutation(sequences)
    one, other = plan(lengths, cluster, costs), plan([lengths[n] for n in order], cluster, costs)
    assert one == plan(lengths, cluster, costs)
    for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
        for g, h in zip(a.groups, b.groups, strict=True):
            assert (g.degree, g.first_rank, g.seconds) == (h.degree, h.first_rank, h.seconds)
            assert [lengths[n] for n in g.sequences] == [lengths[order[n]] for n in h.sequences]


def test_steps_that_cannot_be_planned_are_refused() -> None:
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
    with pytest.raises(ValueError, match=r"no larger than the 2 devices, got \[4\]"):
        plan([3, 4], cluster, Costs(by_degree={4: FREE}))
    with pytest.raises(ValueError, match=r"powers of two, got \[3\]"):
        Costs(by_degree={3: FREE})
    with pytest.raises(ValueError, match="devices of a cluster must be positive, got 0"):
        Cluster(devices=0, memory=1)
    assert plan_one_degree([5], cluster, one) is None


def test_text_of_a_plan() -> None:
    slow = Costs(by_degree={1: FREE, 2: replace(FREE, per_token=0.5)})
    assert str(plan([100, 40, 40, 40], Cluster(devices=4, memory=110), slow, micro_batches=1)) == "<2, 1 x 2>"


def test_fewest_groups_is_the_smallest_partition() -> None:
    for devices in range(1, 20):
        for more in (own for count in range(5) for own in combinations((2, 4, 8, 16), count)):
            degrees = (1, *more)
            assert fewest_groups(reversed(degrees), devices) == partitions(devices, degrees).sum(1).min(), degrees


def test_texts_of_memory() -> None:
    sizes = {0: "0 bytes", 1023: "1023 bytes", 25000: "24.41 KiB", 2**20 - 1: "1024 KiB", 3 * 2**20: "3 MiB"}
    sizes |= {3 * 2**29: "1.5 GiB", 80 * 2**30: "80.0 GiB", 2**41: "2,048.0 GiB"}
    assert {size: bytes_text(size) for size in sizes} == sizes
    assert str(Cluster(devices=4, memory=3 * 2**29)) == "4 devices with 1.5 GiB each"


PLAN = """
from linear_llama3.sequence_parallel.planner import Cluster, load_profile, model_costs, plan
from linear_llama3.sequence_parallel.planner.lengths import read_lengths
profile = load_profile("flexsp-gpt-7b-a100")
costs = model_costs(profile, 16, model=profile.model.with_softmax_every(4))
print(plan(read_lengths("wikipedia", 200).tolist(), Cluster(devices=16, memory=profile.bytes.device), costs))
"""


@pytest.mark.slow
def test_every_process_makes_the_same_plan() -> None:
    """Whatever its hash seed and number of threads."""
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": seed}
        done = subprocess.run([sys.executable, "-c", PLAN], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert outputs.pop().startswith("<")


def test_equal_sequences_and_groups_are_chosen_by_position() -> None:
    """Every choice here is a tie; another rule than the first position would give ranks different plans."""
    costs = Costs(by_degree={1: FREE, 2: replace(FREE, per_token=0.5)})
    step = plan([50] * 6, Cluster(devices=4, memory=1000), costs, micro_batches=1)
    assert [(g.degree, g.first_rank, g.sequences) for g in step.micro_batches[0].groups] == [
        (2, 0, (0, 1, 2)),
        (2, 2, (3, 4, 5)),
    ]


def test_plans_of_one_degree_are_always_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best one degree is found even where the rest of the search finds nothing."""
    case = random_case(3, sequences=40, devices=8)
    monkeypatch.setattr(search, "split", lambda *arguments: [])
    monkeypatch.setattr(search, "partitions", lambda devices, degrees: np.zeros((0, len(degrees)), dtype=np.int64))
    one = plan_one_degree(*case)
    assert one is not None
    assert plan(*case).seconds <= one.seconds
