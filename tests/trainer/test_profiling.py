"""A profile is measured on the processes of a launch, names them, and makes plans."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch import Tensor

from linear_llama3.modeling import LinearLlama3Config
from linear_llama3.sequence_parallel.collectives import all_gather
from linear_llama3.sequence_parallel.costs import LinkSpeed
from linear_llama3.sequence_parallel.planner import Cluster, Profile, load_profile, model_costs, plan
from linear_llama3.trainer.adaptive import profiling
from linear_llama3.trainer.adaptive.groups import planner_model
from linear_llama3.trainer.adaptive.profiling import (
    Bench,
    Sample,
    fit_bytes,
    fit_link,
    fit_seconds,
    measure_profile,
    non_negative_fit,
)
from linear_llama3.trainer.recipes.build import build_config, build_model, load_tokenizer
from linear_llama3.trainer.recipes.recipe import load_recipe
from tests.helpers.ranks import run_distributed
from tests.helpers.recipes import MODEL, recipe_with, write_tokenizer

MICRO, LAYER, TOKEN, LINEAR, SOFTMAX, SQUARE = 0.02, 3e-3, 1e-5, 4e-6, 2e-6, 3e-9
LENGTHS = [[64], [16] * 4, [512], [128] * 4, [4096], [1024] * 4]


def known_seconds(linear: int, softmax: int, lengths: list[int]) -> float:
    """Return the seconds of these layers, one after another, on one device."""
    seconds = MICRO
    for length in lengths:
        seconds += TOKEN * length
    for _ in range(linear):
        seconds += LAYER + sum(LINEAR * length for length in lengths)
    for _ in range(softmax):
        seconds += LAYER + sum(SOFTMAX * length + SQUARE * length * length for length in lengths)
    return seconds


def known_samples(*unused: object) -> list[Sample]:
    kinds = [(layers, lengths) for layers in ((1, 0), (3, 0), (0, 1), (0, 3)) for lengths in LENGTHS]
    bytes_ = [1e6 + sum(own) * (700 + 30 * linear + 50 * softmax) for (linear, softmax), own in kinds]
    return [Sample(*kind, own, known_seconds(*kind, own), n) for (kind, own), n in zip(kinds, bytes_, strict=True)]


def test_coefficients_are_found_again() -> None:
    """Times and bytes of these micro-batches follow the planner's formulas."""
    assert fit_seconds(known_samples()) == pytest.approx([MICRO, LAYER, TOKEN, LINEAR, SOFTMAX, SQUARE], rel=1e-6)
    assert fit_bytes(known_samples()) == pytest.approx([1e6, 700, 30, 50], rel=1e-6)


@pytest.mark.parametrize(("layers", "every"), [(7, 3), (6, 0)])
def test_a_profile_predicts_the_depth_of_the_recipe(
    layers: int, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured were models of one and of three layers; the planner's costs are of all the model's."""
    write_tokenizer(tmp_path / "tokenizer")
    model = MODEL | {"num_hidden_layers": layers, "full_attention_interval": every}
    monkeypatch.setattr(Bench, "samples", known_samples)
    profile = measure_profile(load_recipe(recipe_with(tmp_path, model=model)), name="mine")
    costs, softmax = model_costs(profile, 1), layers // every if every else 0
    for lengths in ([1000], [300, 20, 5000], [7] * 9):
        expected = known_seconds(layers - softmax, softmax, lengths)
        assert costs.seconds(lengths, 1) == pytest.approx(expected, rel=1e-6)
    grown = costs.memory(3000, 1) - costs.memory(1000, 1)
    assert grown == pytest.approx(2000 * (700 + 30 * (layers - softmax) + 50 * softmax), rel=1e-6)


LATENCY, BANDWIDTH = {2: 1e-4, 4: 7e-4}, {2: 3e9, 4: 5e8}


def links_of_known_speed(path: str) -> dict[int, LinkSpeed]:
    """Every message takes its latency, and its bytes to each of the other ranks at the bandwidth of the degree."""
    recipe, sent = load_recipe(path), []

    def counted(message: Tensor, group: dist.ProcessGroup) -> Any:
        sent.append((message.nbytes, dist.get_world_size(group)))
        return all_gather(message, group)

    def timed(bench: Bench, function: Callable[[], object], repeats: int) -> float:
        sent.clear()
        function()
        ((size, ranks),) = sent
        return LATENCY[ranks] + sum(size / BANDWIDTH[ranks] for _ in range(1, ranks))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "all_gather", counted)
        patch.setattr(Bench, "timed", timed)
        return Bench(recipe, build_config(recipe, load_tokenizer(recipe))).links()


def test_links_are_found_again(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    for links in run_distributed(links_of_known_speed, 4, str(recipe_with(tmp_path))):
        assert {degree: link.latency for degree, link in links.items()} == pytest.approx(LATENCY, rel=1e-6)
        assert {degree: link.bandwidth for degree, link in links.items()} == pytest.approx(BANDWIDTH, rel=1e-6)


def test_links_without_a_bandwidth_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of 4 ranks must take longer for 4,194,304 bytes than .* got 3, 2, 1, 1 s"):
        fit_link(4, [3.0, 2.0, 1.0, 1.0])


def test_no_coefficient_is_negative() -> None:
    columns = np.array([[1.0, n] for n in (1, 2, 4, 8)])
    assert non_negative_fit(columns, np.array([4.0, 3.9, 3.6, 3.0])) == pytest.approx([3.57, 0], rel=0.02)


def measured(path: str) -> Profile:
    profiling.REPEATS = 1
    return measure_profile(load_recipe(path), name="mine")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)], ids="W{}".format)
def test_a_measured_profile_makes_plans(ranks: int, tmp_path: Path) -> None:
    """All ranks have the same profile; it survives its file and plans its own model."""
    tokenizer, path = write_tokenizer(tmp_path / "tokenizer"), recipe_with(tmp_path, sequence_length=256)
    recipe, profiles = load_recipe(path), run_distributed(measured, ranks, str(path))
    assert [p.seconds for p in profiles] == [profiles[0].seconds] * ranks
    profile = profiles[0]
    assert profile.origin == "measured" and "torch " in profile.source and f"{ranks} processes" in profile.source
    assert profile.processes == ranks
    assert f"{datetime.date.today()}" in profile.source and profile.hardware.startswith("CPU")
    profile.save(tmp_path / "mine.json")
    assert load_profile(tmp_path / "mine.json") == profile
    seconds = profile.seconds
    assert seconds.micro_batch > 0 and seconds.token + seconds.linear_token > 0
    assert sorted(profile.links) == [2, 4][: ranks // 2]
    assert all(0 < link.bandwidth < 1e12 for link in profile.links.values())
    parameters = build_model(recipe, tokenizer).num_parameters()
    assert 20 * parameters <= profile.bytes.states < 40 * parameters + 1e5  # with gradients, AdamW's states, buckets
    assert profile.bytes.token + profile.bytes.linear_token > 0
    costs = model_costs(profile, ranks)
    step = plan([200, 100, 50, 25, 12, 6], Cluster(devices=ranks, memory=profile.bytes.device), costs)
    assert sorted(i for batch in step.micro_batches for group in batch.groups for i in group.sequences) == [*range(6)]


def test_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a profile is of training all weights, got lora"):
        measure_profile(load_recipe(recipe_with(tmp_path, lora={"r": 2})), name="mine")


@pytest.mark.parametrize("mixer", ["basic", "lightning", "retention", "gla"])
def test_the_simulated_profile_is_of_its_preset(mixer: str) -> None:
    profile = load_profile("llama-3.1-8b-h100")
    for interval in (None, 4, 1):
        config = LinearLlama3Config.from_preset(f"linear-llama-3.1-8b-{mixer}-pure", full_attention_interval=interval)
        profile.require(planner_model(config, 2))
    with pytest.raises(ValueError, match=f"with mixer other, the model {mixer}; make a profile of this model"):
        replace(profile, model=replace(profile.model, mixer="other")).require(planner_model(config, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 2048, "head_dim": 128}, "hidden_size 4096, the model 2048"),
        ({"intermediate_size": 8192}, "intermediate_size 14336, the model 8192"),
        ({"vocab_size": 32000}, "vocab_size 128256, the model 32000"),
        ({"tie_word_embeddings": True}, "tied_embeddings False, the model True"),
    ],
)
def test_profiles_of_other_sizes_are_refused(change: dict[str, Any], message: str) -> None:
    config = LinearLlama3Config.from_preset("linear-llama-3.1-8b", **change)
    with pytest.raises(ValueError, match=f"with {message}; make a profile of this model"):
        load_profile("llama-3.1-8b-h100").require(planner_model(config, 2))
