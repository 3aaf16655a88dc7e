"""Costs by layer kind and strategy are those of the design: sums over layers, written out here once more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from linear_llama3.sequence_parallel.planner import DegreeCosts, Profile, load_profile, model_costs
from linear_llama3.sequence_parallel.planner.profile import ORIGINS, profile_names

LAYERS, HIDDEN, HEADS, DIM = 32, 4096, 32, 128
A1, A2, B1 = 5.128e-6 / 1e3, 0.18396 / 1e3, 0.6294  # FlexSP's of a GPT with 7 billion parameters on A100s
SPEED = {2: 119.54e9, 8: 96.5e9, 16: 10.33e9, 32: 5.94e9, 64: 4.87e9}
STATES = 16 * (12 * LAYERS * HIDDEN**2 + 51200 * HIDDEN)


@pytest.fixture
def seven() -> Profile:
    return load_profile("flexsp-gpt-7b-a100")


def of(profile: Profile, degree: int, every: int | None, **strategies: str) -> DegreeCosts:
    model = profile.model.with_softmax_every(every)
    return model_costs(profile, 64, model=model, **strategies).by_degree[degree]


@pytest.mark.parametrize("degree", [2, 8, 16])
def test_ulysses(seven: Profile, degree: int) -> None:
    """Eight activations of a token are moved in a layer, forward and backward, but for each rank's own part."""
    group = of(seven, degree, 1, softmax="ulysses")
    moved = 8 * HIDDEN * 2 * LAYERS * (degree - 1) / degree
    assert group.fixed == pytest.approx(B1)
    assert group.per_square == pytest.approx(A1 / degree)
    assert group.per_token == pytest.approx((A2 + moved / SPEED[degree]) / degree)
    assert group.bytes_per_token == pytest.approx(4.48 * 2**20 / degree, rel=1e-6)
    assert group.fixed_bytes == pytest.approx(STATES / 64)


@pytest.mark.parametrize(("strategy", "moved"), [("lasp2h", 2 + 4), ("ring", 0.75 * (2 + 2 + 4))])
def test_keys_and_values(seven: Profile, strategy: str, moved: float) -> None:
    """Of K and V every rank sends its own to all: so a token costs as much as in any degree, but for the own part."""
    model = replace(seven.model, kv_heads=8)
    grouped = replace(seven, model=model)
    group = model_costs(grouped, 64, softmax=strategy).by_degree[8]
    sent = 2 * 8 * DIM * moved * LAYERS * (8 - 1)  # zigzag layout: three quarters of a ring
    assert group.per_token == pytest.approx((A2 + sent / SPEED[8]) / 8)
    gathered = 2 * 8 * DIM * (2 + 4) if strategy == "lasp2h" else 0  # K and V, and their gradients in float32
    assert group.bytes_per_token == pytest.approx(4.48 * 2**20 / 8 + gathered, rel=1e-6)


STATE = HEADS * DIM * DIM * 4  # float32


@pytest.mark.parametrize(("every", "linear_layers", "chunks"), [(4, 24, 2), (8, 28, 2), (None, 32, 1)])
@pytest.mark.parametrize("degree", [8, 64])
def test_states(seven: Profile, every: int | None, linear_layers: int, chunks: int, degree: int) -> None:
    """They cost a group, not a token; the gather grows with the degree, the scan by all-to-all does not."""
    softmax = {8: "ulysses", 64: "ring"}[degree]  # 32 heads
    gather = of(seven, degree, every, linear="lasp2", softmax=softmax)
    scan = of(seven, degree, every, linear="all_to_all", softmax=softmax)
    assert gather.fixed == pytest.approx(B1 + linear_layers * 2 * chunks * (degree - 1) * STATE / SPEED[degree])
    assert scan.fixed == pytest.approx(B1 + linear_layers * 4 * chunks * (degree - 1) / degree * STATE / SPEED[degree])
    assert gather.per_token == scan.per_token
    assert gather.fixed_bytes - scan.fixed_bytes == degree * chunks * STATE
    if every is None:
        assert scan.per_token == pytest.approx(A2 / degree)
        assert scan.per_square == 0
    else:
        assert scan.per_square == pytest.approx(A1 * (32 - linear_layers) / 32 / degree)


def test_lasp1_waits_for_every_hop(seven: Profile) -> None:
    linked = replace(seven, links={8: seven.links[8]._replace(latency=1e-3)})
    group = of(linked, 8, None, linear="lasp1")
    assert group.fixed == pytest.approx(B1 + 32 * 2 * 7 * (1e-3 + STATE / SPEED[8]))


def test_one_device_sends_nothing(seven: Profile) -> None:
    one = of(seven, 1, 4)
    assert (one.fixed, one.per_token) == pytest.approx((B1, A2))
    assert (one.linear, one.softmax) == ("", "")


def test_kinds_of_layers_have_their_own_work(seven: Profile) -> None:
    profile = replace(
        seven,
        seconds=replace(seven.seconds, softmax_token=1e-4, linear_token=1e-5),
        bytes=replace(seven.bytes, softmax_token=100.0, linear_token=7.0, sharded=False),
    )
    one = of(profile, 1, 8)
    assert one.per_token == pytest.approx(A2 + 4 * 1e-4 + 28 * 1e-5)
    assert one.bytes_per_token == seven.bytes.token + 4 * 100 + 28 * 7
    assert one.fixed_bytes == STATES


def test_auto_takes_the_fastest_that_can_be_used(seven: Profile) -> None:
    costs = model_costs(seven, 64)
    assert {degree: group.softmax for degree, group in costs.by_degree.items()} == {
        **{1: "", 2: "ulysses", 4: "ulysses", 8: "ulysses", 16: "ulysses", 32: "ulysses"},
        64: "ring",  # 32 heads; LASP-2H would gather 20 GB
    }
    for every in (4, None):
        for degree in (2, 8, 64):
            chosen = of(seven, degree, every)
            assert chosen.fixed == min(
                of(seven, degree, every, linear=name).fixed for name in ("lasp1", "lasp2", "all_scan", "all_to_all")
            )
    with_small_keys = replace(seven, model=replace(seven.model, kv_heads=1, q_heads=30))
    assert model_costs(with_small_keys, 4).by_degree[4].softmax == "lasp2h"


def test_strategies_leave_out_degrees(seven: Profile) -> None:
    assert list(model_costs(seven, 64, softmax="ulysses").by_degree) == [1, 2, 4, 8, 16, 32]
    assert list(model_costs(seven, 16).by_degree) == [1, 2, 4, 8, 16]
    for kind in ("linear", "softmax"):
        with pytest.raises(ValueError, match=f"{kind} layers must be one of .* got 'lasp9'"):
            model_costs(seven, 64, **{kind: "lasp9"})


def test_layouts_pad_to_their_chunks(seven: Profile) -> None:
    costs = model_costs(seven, 64)
    assert costs.chunks_per_rank == 2
    assert model_costs(seven, 64, model=seven.model.with_softmax_every(None)).chunks_per_rank == 1
    capacity = costs.capacity(8, seven.bytes.device)
    assert capacity % 16 == 0
    assert costs.memory(capacity, 8) <= seven.bytes.device < costs.memory(capacity + 1, 8)


@pytest.mark.parametrize("name", profile_names())
def test_profiles_of_the_package(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.origin in ORIGINS
    profile.save(tmp_path / "copy.json")
    assert load_profile(tmp_path / "copy.json") == profile
    for every in (1, 4, 8, None):
        costs = model_costs(profile, 64, model=profile.model.with_softmax_every(every))
        assert all(group.per_token > 0 and group.fixed > 0 for group in costs.by_degree.values())


def test_only_published_and_simulated_profiles_are_shipped() -> None:
    """A measured one would need the machine that it was measured on to be named, and its log."""
    assert {name: load_profile(name).origin for name in profile_names()} == {
        "flexsp-gpt-7b-a100": "published",
        "flexsp-gpt-13b-a100": "published",
        "flexsp-gpt-30b-a100": "published",
        "llama-3.1-8b-h100": "simulated",
    }


def test_a_profile_of_another_model_is_refused(seven: Profile) -> None:
    seven.require(seven.model.with_softmax_every(8))
    with pytest.raises(ValueError, match="'flexsp-gpt-7b-a100' with kv_heads 32, the model 8; make a profile"):
        model_costs(seven, 64, model=replace(seven.model, kv_heads=8))
    with pytest.raises(ValueError, match="32 layers, the model 33"):
        seven.require(replace(seven.model, linear_layers=1))


def test_files_that_are_no_profile_are_refused(seven: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(ValueError, match=r"must be one of \['flexsp.* got 'gpt'"):
        load_profile("gpt")
    with pytest.raises(ValueError, match=r"or a \.json file, got"):
        load_profile(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a profile is a JSON file that holds name, origin, .*profile.json"):
        load_profile(path)
    seven.save(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "origin": "guessed"}))
    with pytest.raises(ValueError, match=r"origin must be one of .* got 'guessed'"):
        load_profile(path)
    path.write_text(json.dumps({**data, "seconds": {"token": 1}}))
    with pytest.raises(ValueError, match=r"a profile is a JSON file .*missing"):
        load_profile(path)
