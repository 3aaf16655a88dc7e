"""Costs by kind of layer and strategy, against sums over layers that are written out here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from linear_llama3.sequence_parallel.costs import LinkSpeed
from linear_llama3.sequence_parallel.planner import (
    Cluster,
    Costs,
    DegreeCosts,
    Model,
    Profile,
    load_profile,
    lower_bound,
    model_costs,
    plan,
    plan_one_degree,
)
from linear_llama3.sequence_parallel.planner import profile as profiles
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


@pytest.mark.parametrize("degree", [2, 8, 16], ids="D{}".format)
def test_ulysses(seven: Profile, degree: int) -> None:
    """Eight activations of a token are moved in a layer, forward and backward, except each rank's own part."""
    group = of(seven, degree, 1, softmax="ulysses")
    moved = 8 * HIDDEN * 2 * LAYERS * (degree - 1) / degree
    assert group.fixed == pytest.approx(B1)
    assert group.per_square == pytest.approx(A1 / degree)
    assert group.per_token == pytest.approx((A2 + moved / SPEED[degree]) / degree)
    assert group.bytes_per_token == pytest.approx(4.48 * 2**20 / degree, rel=1e-6)
    assert group.fixed_bytes == pytest.approx(STATES / 64)


@pytest.mark.parametrize(("strategy", "moved"), [("lasp2h", 2 + 4), ("ring", 0.75 * (2 + 2 + 4))])
def test_keys_and_values(seven: Profile, strategy: str, moved: float) -> None:
    """Every rank sends its own K and V to all others: a token costs the same in any degree, except for the own part."""
    model = replace(seven.model, kv_heads=8)
    grouped = replace(seven, model=model)
    group = model_costs(grouped, 64, softmax=strategy).by_degree[8]
    sent = 2 * 8 * DIM * moved * LAYERS * (8 - 1)  # zigzag layout: three quarters of a ring
    assert group.per_token == pytest.approx((A2 + sent / SPEED[8]) / 8)
    gathered = 2 * 8 * DIM * (2 + 4) if strategy == "lasp2h" else 0  # K and V, and their gradients in float32
    assert group.bytes_per_token == pytest.approx(4.48 * 2**20 / 8 + gathered, rel=1e-6)


STATE = HEADS * DIM * DIM * 4  # float32


@pytest.mark.parametrize(("every", "linear_layers", "chunks"), [(4, 24, 2), (8, 28, 2), (None, 32, 1)])
@pytest.mark.parametrize("degree", [8, 64], ids="D{}".format)
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
        unknown: dict[str, Any] = {kind: "lasp9"}
        with pytest.raises(ValueError, match=f"{kind} layers must be one of .* got 'lasp9'"):
            model_costs(seven, 64, **unknown)


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


def test_a_profile_is_refused_for_any_other_size_of_the_model(seven: Profile) -> None:
    own = replace(seven, model=replace(seven.model, mixer="gla"))
    other: dict[str, Any] = {"state": (32, 128, 129), "mixer": "basic", "decays": True, "tied_embeddings": False}
    for field in (field.name for field in fields(Model) if not field.name.endswith("_layers")):
        model = replace(own.model, **{field: other.get(field, 7)})
        with pytest.raises(ValueError, match=f"with {field} .*, the model .*; make a profile of this model"):
            model_costs(own, 64, model=model)
    model_costs(seven, 64, model=replace(seven.model, mixer="gla"))  # a profile without a mixer is of any


def entries(data: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers, texts and truth values of a profile's file, as "seconds.token"."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from entries(value, f"{before}{key}.")
        elif not isinstance(value, list):
            yield before + key, value


def with_entry(data: dict[str, Any], entry: str, value: Any) -> dict[str, Any]:
    first, _, rest = entry.partition(".")
    return {**data, first: with_entry(data[first], rest, value) if rest else value}


SIMULATED = json.loads((Path(profiles.__file__).parent / "profiles/llama-3.1-8b-h100.json").read_text())
MEASURED = {**SIMULATED, "origin": "measured", "processes": 8, "model": {**SIMULATED["model"], "mixer": "gla"}}
MEASURED["links"] = {degree: SIMULATED["links"][degree] for degree in ("2", "64")}
MAY_BE_NULL = ("gradient_checkpointing", "model.mixer")


def wrong_values(entry: str, good: Any) -> list[Any]:
    """Numbers must be finite, not negative, and numbers; counts must be integers."""
    count = entry == "processes" or entry.startswith("model.")
    if isinstance(good, bool):
        wrong = ["false", 0, 1]
    elif isinstance(good, str):
        wrong = [1, True, ["x"]]
    else:
        wrong = [math.nan, math.inf, -math.inf, -1, -1e-300, "1", True, [1], {"a": 1}, 10**400]
        wrong += [good + 0.5, float(good)] if count else []
        wrong += [0] if (count and "_layers" not in entry) or entry.endswith(("device", "bandwidth")) else []
    return wrong + ([] if entry in MAY_BE_NULL else [None])


@pytest.mark.parametrize("section", ["", "model.", "seconds.", "bytes.", "links."])
def test_wrong_values_of_a_file_are_refused(section: str, tmp_path: Path) -> None:
    """The message names entry, value and file."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(MEASURED))
    load_profile(path)
    own = [(entry, good) for entry, good in entries(MEASURED) if entry.rpartition(".")[0].startswith(section[:-1])]
    for entry, good in own if section else [(entry, good) for entry, good in own if "." not in entry]:
        for value in wrong_values(entry, good):
            path.write_text(json.dumps(with_entry(MEASURED, entry, value)))
            with pytest.raises(ValueError) as caught:
                load_profile(path)
            message = str(caught.value)
            expected = f"{entry} must be ", f"got {value!r}", str(path), "`linear-llama3 profile`"
            assert all(part in message for part in expected), message


def test_wrong_states_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for state in ([8, 128], [8, 128, 0], [8, 128, 1.5], 8, None, "abc"):
        path.write_text(json.dumps(with_entry(MEASURED, "model.state", state)))
        with pytest.raises(ValueError, match=r"model.state must be three integers .*, got .* in .*mine.json"):
            load_profile(path)


def test_links_are_of_powers_of_two(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for degree in ("abc", "3", "1", "0", "-2", "2.0"):
        links = {**MEASURED["links"], degree: {"latency": 0.0, "bandwidth": 1.0}}
        path.write_text(json.dumps({**MEASURED, "links": links}))
        with pytest.raises(ValueError, match=f"links must be a power of two from 2 on, got '?{degree}'? in .*mine"):
            load_profile(path)


def test_profiles_made_by_hand_are_checked(seven: Profile) -> None:
    for wrong in (math.nan, math.inf, -1.0, "1"):
        with pytest.raises(ValueError, match=r"seconds.token must be a finite number, 0 or more, got"):
            replace(seven.seconds, token=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bytes.sharded must be true or false, got 'false'"):
        replace(seven.bytes, sharded="false")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"links.2.bandwidth must be a finite number above 0, got 0"):
        replace(seven, links={2: LinkSpeed(0.0, 0)})
    with pytest.raises(ValueError, match="processes must be stated by a measured profile, got None"):
        replace(seven, origin="measured")


GOOD: dict[str, Any] = {"fixed": 1.0, "per_token": 1.0, "per_square": 0.0, "fixed_bytes": 0.0, "bytes_per_token": 1.0}


@pytest.mark.parametrize("field", list(GOOD))
def test_costs_made_by_hand_are_checked(field: str) -> None:
    for wrong in (math.nan, math.inf, -1.0, "1", None):
        with pytest.raises(ValueError, match=f"DegreeCosts.{field} must be a finite number, 0 or more, got"):
            DegreeCosts(**{**GOOD, field: wrong})
    DegreeCosts(**{**GOOD, field: np.float32(2)})
    with pytest.raises(ValueError, match=r"chunks_per_rank must be an integer from 1 .*, got 0"):
        Costs(by_degree={1: DegreeCosts(**GOOD)}, chunks_per_rank=0)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("changes", [{"fixed": 0, "per_token": 0}, {"per_square": 1e308}, {"per_token": 1e308}])
def test_steps_take_a_finite_time_above_zero(changes: dict[str, float]) -> None:
    costs, cluster = Costs(by_degree={1: DegreeCosts(**{**GOOD, **changes})}), Cluster(devices=2, memory=100)
    for ask in (plan, plan_one_degree, lower_bound):
        with pytest.raises(
            ValueError, match=r"a step a finite time above 0, got (0.0|inf) s for 3 sequences of up to 30"
        ):
            ask([10, 20, 30], cluster, costs)


def test_numbers_may_be_large() -> None:
    """Infinite memory sets no limit; integers beyond 64 bits are seconds like others."""
    two = {1: DegreeCosts(**GOOD), 2: DegreeCosts(**{**GOOD, "per_token": 0.9})}
    lengths = [100, 50, 30, 20, 20, 10, 5, 5, 5, 5, 5, 5]
    enough = plan(lengths, Cluster(devices=2, memory=1e6), Costs(by_degree=two))
    for memory in (math.inf, 1e300):
        assert plan(lengths, Cluster(devices=2, memory=memory), Costs(by_degree=two)) == enough
    huge = Costs(by_degree={d: replace(cost, fixed=2**70, per_token=2**70) for d, cost in two.items()})
    assert plan(lengths, Cluster(devices=2, memory=1e6), huge).seconds == pytest.approx(2**70 * (1 + 130))


def test_files_that_are_no_profile_are_refused(seven: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(ValueError, match=r"must be one of \['flexsp.* got 'gpt'"):
        load_profile("gpt")
    with pytest.raises(ValueError, match=r"or a \.json file, got"):
        load_profile(path)
    with pytest.raises(ValueError, match=r"or a \.json file, got .*profile.txt"):
        load_profile(tmp_path / "profile.txt")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match=r"a profile is a JSON file .*folder.json: IsADirectoryError"):
        load_profile(tmp_path / "folder.json")
    for content in (b"\xff\xfe", b"[]", b"null", b"3", b'"x"', b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a profile is a JSON file that .*profile.json.*`linear-llama3 profile`"):
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
