"""Placing and polishing, by plain loops."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import numpy as np
import pytest

from linear_llama3.sequence_parallel.planner import Cluster, Costs, DegreeCosts
from linear_llama3.sequence_parallel.planner.bundles import plan_bundled
from linear_llama3.sequence_parallel.planner.effort import Effort
from linear_llama3.sequence_parallel.planner.group_costs import Table, tabulate
from linear_llama3.sequence_parallel.planner.partitions import partitions
from linear_llama3.sequence_parallel.planner.placement import LONGEST_FIRST, NEVER, Part, Placement, least_slack
from linear_llama3.sequence_parallel.planner.polish import polish
from linear_llama3.sequence_parallel.planner.search import least_repeats
from tests.helpers.planner_cases import random_case

Score = Callable[[int, int, int], float]  # of a group's ticks and room afterwards and its capacity: the least one wins
SCORES: tuple[Score, ...] = (
    lambda ticks, room, capacity: ticks,
    lambda ticks, room, capacity: -room / capacity,
    lambda ticks, room, capacity: room,
)


def plainly(table: Table, degrees: list[int], score: Score) -> list[int] | None:
    kind = [table.degrees.tolist().index(degree) for degree in degrees]
    load, room = [int(table.fixed[k]) for k in kind], [int(table.capacity[k]) for k in kind]
    chosen = []
    for n, length in enumerate(table.lengths.tolist()):
        fits = [g for g in range(len(kind)) if room[g] >= length]
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


@pytest.mark.parametrize(("place", "score"), zip(LONGEST_FIRST, SCORES, strict=True), ids=["done", "fill", "best fit"])
def test_longest_first(place: Callable, score: Score) -> None:
    placed = 0
    for seed in range(20):
        table = tabulate(*random_case(seed, sequences=12, devices=8))
        options = partitions(8, tuple(table.degrees.tolist()))
        ticks, chosen = place(table, options)
        for option, slowest, groups in zip(options, ticks, chosen, strict=True):
            degrees = np.repeat(table.degrees, option)[::-1].tolist()
            expected = plainly(table, degrees, score)
            assert (slowest < NEVER) == (expected is not None)
            if expected is not None:
                placed += 1
                assert groups.tolist() == expected
    assert placed > 40


def test_least_slack_fills_groups_to_the_brim() -> None:
    """Only where every group is full to the last token is there room for all."""
    one = DegreeCosts(fixed=0, per_token=1, per_square=0, fixed_bytes=0, bytes_per_token=1)
    rng, longest_first = np.random.default_rng(0), 0
    for _ in range(30):
        cuts = [np.diff(np.sort([0, *rng.choice(np.arange(1, 1000), 2, replace=False), 1000])) for _ in range(4)]
        table = tabulate(np.concatenate(cuts).tolist(), Cluster(devices=4, memory=1000), Costs(by_degree={1: one}))
        ticks, groups = least_slack(table, np.array([[4]]))
        longest_first += min(int(place(table, np.array([[4]]))[0][0]) for place in LONGEST_FIRST) < NEVER
        if ticks[0] < NEVER:
            assert np.bincount(groups[0], weights=table.lengths).tolist() == [1000] * 4
            longest_first -= 1
    assert longest_first < -5  # it found room that often where they did not


@pytest.mark.parametrize("devices", [3, 4, 8])
def test_least_repeats_is_a_bound(devices: int) -> None:
    for seed in range(20):
        table = tabulate(*random_case(seed, sequences=14, devices=devices))
        options = partitions(devices, tuple(table.degrees.tolist()))
        least = least_repeats(table, options)
        for count in (1, 2, 3):
            for place in (*LONGEST_FIRST, least_slack):
                ticks, _ = place(table, options * count)
                assert (least[ticks < NEVER] <= count).all()


def test_polish_moves_nothing_beyond_memory() -> None:
    """The only change that saves time would fill a group of 10 tokens with 11."""
    square = DegreeCosts(fixed=0, per_token=0, per_square=1, fixed_bytes=0, bytes_per_token=1)
    for memory, expected in ((10, [[3, 6], [4, 4]]), (11, [[3, 4, 4], [6]])):
        table = tabulate([6, 4, 4, 3], Cluster(devices=2, memory=memory), Costs(by_degree={1: square}))
        placement = Placement(int(table.times[[0, 3], 0].sum()), np.array([1, 1]), np.array([0, 1, 1, 0]))
        part = polish(table, [Part(np.arange(4), placement)], Effort(inf))[0]
        held = [sorted(table.lengths[part.placement.groups == group].tolist()) for group in (0, 1)]
        assert sorted(held) == expected
        loads = [sum(s * s for s in own) for own in held]
        assert part.placement.ticks == pytest.approx(max(loads) * table.times[0, 0] / 36, rel=1e-6)


def test_polish_and_bundles_keep_what_plans_promise() -> None:
    """Bad plans become no worse, and most of them better."""
    better = 0
    for seed in range(12):
        table = tabulate(*random_case(seed, sequences=16, devices=4))
        options = partitions(4, tuple(table.degrees.tolist()))
        ticks, groups = LONGEST_FIRST[2](table, options)
        for option in np.flatnonzero(ticks < NEVER):
            degrees = np.repeat(table.degrees, options[option])[::-1]
            before = Placement(int(ticks[option]), degrees, groups[option])
            after = polish(table, [Part(np.arange(16), before)], Effort(inf), pairs=True)
            check(table, after)
            assert after[0].placement.ticks <= before.ticks
            better += after[0].placement.ticks < before.ticks
            unpaid = polish(table, [Part(np.arange(16), before)], Effort(0), pairs=True)
            assert unpaid[0].placement.ticks == before.ticks
        check(table, plan_bundled(table, None, Effort(inf)))
    assert better >= 10


def check(table: Table, parts: list[Part]) -> None:
    assert sorted(np.concatenate([part.rows for part in parts]).tolist()) == list(range(len(table)))
    for part in parts:
        placement = part.placement
        assert placement.degrees.sum() == table.devices
        assert set(placement.groups.tolist()) == set(range(len(placement.degrees)))
        kind = np.searchsorted(table.degrees, placement.degrees)
        for group, own in enumerate(kind):
            mine = part.rows[placement.groups == group]
            assert table.lengths[mine].sum() <= table.capacity[own]
            assert table.fixed[own] + table.times[mine, own].sum() <= placement.ticks
