"""A profile is measured on the processes of a launch, says so, and is what plans are made by."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest

from linear_llama3.sequence_parallel.planner import Cluster, Profile, load_profile, model_costs, plan
from linear_llama3.trainer import profiling
from linear_llama3.trainer.build import build_model
from linear_llama3.trainer.profiling import Sample, fit_bytes, fit_seconds, measure_profile, non_negative_fit
from linear_llama3.trainer.recipe import load_recipe
from tests.distributed import run_distributed
from tests.trainer.test_recipe import recipe_with, write_tokenizer


def test_coefficients_are_found_again() -> None:
    """Of micro-batches whose times and bytes follow the planner's formulas."""
    known = {"micro": 0.02, "layer": 3e-3, "token": 1e-5, "linear": 4e-6, "softmax": 2e-6, "square": 3e-9}
    samples = []
    for linear, softmax in ((1, 0), (3, 0), (0, 1), (0, 3)):
        for lengths in ([64], [16] * 4, [512], [128] * 4, [4096], [1024] * 4):
            n, squares = sum(lengths), sum(s * s for s in lengths)
            seconds = known["micro"] + known["layer"] * (linear + softmax) + known["token"] * n
            seconds += linear * known["linear"] * n + softmax * (known["softmax"] * n + known["square"] * squares)
            samples.append(
                Sample(linear, softmax, lengths, seconds, 1e6 + 700 * n + 30 * linear * n + 50 * softmax * n)
            )
    assert fit_seconds(samples) == pytest.approx(list(known.values()), rel=1e-6)
    assert fit_bytes(samples) == pytest.approx([1e6, 700, 30, 50], rel=1e-6)


def test_no_coefficient_is_negative() -> None:
    columns = np.array([[1.0, n] for n in (1, 2, 4, 8)])
    assert non_negative_fit(columns, np.array([4.0, 3.9, 3.6, 3.0])) == pytest.approx([3.57, 0], rel=0.02)


def measured(path: str) -> Profile:
    profiling.REPEATS = 1
    return measure_profile(load_recipe(path), name="mine")


def test_a_measured_profile_makes_plans(tmp_path: Path) -> None:
    """On four ranks: the same profile on all of them, which survives its file and plans its own model."""
    tokenizer, path = write_tokenizer(tmp_path / "tokenizer"), recipe_with(tmp_path, sequence_length=256)
    recipe, profiles = load_recipe(path), run_distributed(measured, 4, str(path))
    assert [p.seconds for p in profiles] == [profiles[0].seconds] * 4
    profile = profiles[0]
    assert profile.origin == "measured" and "torch " in profile.source and "4 processes" in profile.source
    assert profile.processes == 4
    assert f"{datetime.date.today()}" in profile.source and profile.hardware.startswith("CPU")
    profile.save(tmp_path / "mine.json")
    assert load_profile(tmp_path / "mine.json") == profile
    seconds = profile.seconds
    assert seconds.micro_batch > 0 and seconds.token + seconds.linear_token > 0
    assert sorted(profile.links) == [2, 4] and all(0 < link.bandwidth < 1e12 for link in profile.links.values())
    parameters = build_model(recipe, tokenizer).num_parameters()
    assert 20 * parameters <= profile.bytes.states < 40 * parameters + 1e5  # with gradients, AdamW's states, buckets
    assert profile.bytes.token + profile.bytes.linear_token > 0
    costs = model_costs(profile, 4)
    step = plan([200, 100, 50, 25, 12, 6], Cluster(devices=4, memory=profile.bytes.device), costs)
    assert sorted(i for batch in step.micro_batches for group in batch.groups for i in group.sequences) == [*range(6)]


def test_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a profile is of training all weights, got lora"):
        measure_profile(load_recipe(recipe_with(tmp_path, lora={"r": 2})), name="mine")
