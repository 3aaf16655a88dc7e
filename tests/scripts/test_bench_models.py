"""Benchmarks of complete models: the bytes, parameters and ratios they report, for times that are known."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
LLAMA, LINEAR, HYBRID = MODELS = ["Llama (SDPA)", "gla, pure linear", "basic, hybrid 1/4"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """Run a benchmark's command line and return its rows by model."""

    def run(benchmark: Any, *arguments: str) -> dict[str, dict[str, Any]]:
        out = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", ["", *arguments, "--models", *MODELS, "--repeats", "1", "--out", str(out)])
        benchmark.main()
        result = json.loads(out.read_text())
        assert result["setting"].keys() >= {"date", "hardware", "versions"}
        return {row["model"]: row for row in result["rows"]}

    return run


def test_caches_hold_states_and_keys_and_values(script: Any, rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = {name: row["cache_bytes"] for name, row in rows(script("bench_decode"), "--positions", "20", "150").items()}
    state, keys_and_values = 2 * 64 * 64 * 4, 2 * 2 * 64 * 4  # bytes: of a layer; of a layer and token
    assert found == {
        LLAMA: [4 * n * keys_and_values for n in (20, 150)],
        LINEAR: [4 * state] * 2,
        HYBRID: [3 * state + n * keys_and_values for n in (20, 150)],
    }
    assert len(capsys.readouterr().out.splitlines()) == 4 + 3


def test_decoding_seconds_belong_to_their_cache(script: Any) -> None:
    """Caches that take 1 ms and 15 ms keep their order, although they take turns at random."""

    def model(token: torch.Tensor, past_key_values: float, use_cache: bool) -> None:
        time.sleep(past_key_values)

    fast, slow = script("bench_decode").step_seconds(model, [0.001, 0.015], repeats=5)
    assert 0.001 <= fast < 0.015 <= slow


def test_ratios_are_those_of_known_seconds(script: Any, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama takes 3 s in every step except the first, which is not counted; the other models take 2 s."""
    benchmark, steps = script("bench_training_step"), []

    def train_on(model: Any, optimizer: Any, ids: torch.Tensor) -> float:
        steps.append(model)
        return 99.0 if len(steps) <= len(MODELS) else 3.0 if model.config.model_type == "llama" else 2.0

    monkeypatch.setattr(benchmark, "train_on", train_on)
    found = rows(benchmark, "--tokens", "48")
    assert {name: (row["seconds"], row["ratio"]) for name, row in found.items()} == {
        LLAMA: (3.0, 1.0),
        LINEAR: (2.0, 1.5),
        HYBRID: (2.0, 1.5),
    }
    hidden, key, inner, vocabulary, layers = 256, 128, 688, 4096, 4
    layer = 2 * hidden * hidden + 2 * hidden * key + 3 * hidden * inner + 2 * hidden
    assert found[LLAMA]["parameters"] == 2 * vocabulary * hidden + layers * layer + hidden
    assert all(1 <= row["parameters"] / found[LLAMA]["parameters"] < 1.1 for row in found.values())


def test_a_training_step_changes_the_parameters(script: Any) -> None:
    model = script("bench_models").make_model(LINEAR).train()
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters())
    assert script("bench_training_step").train_on(model, optimizer, script("bench_models").random_ids(8)) > 0
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
