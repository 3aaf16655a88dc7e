"""The benchmarks of whole models: what they count, and that they run; times are not tested."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODELS = ["gla, pure linear", "basic, hybrid 1/4", "Llama (SDPA)"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def call(script: str, *arguments: str) -> list[dict[str, Any]]:
        out = tmp_path / "rows.json"
        command = [script, *arguments, "--models", *MODELS, "--repeats", "1", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", command)
        importlib.import_module(script).main()
        result = json.loads(out.read_text())
        assert result["setting"].keys() >= {"date", "hardware", "versions"}
        return result["rows"]

    return call


def test_decoding(run: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]) -> None:
    pure, hybrid, llama = run("bench_decode", "--positions", "20", "150")
    assert [row["model"] for row in (pure, hybrid, llama)] == MODELS
    state, keys_and_values = 2 * 64 * 64 * 4, 2 * 2 * 64 * 4  # bytes: of a layer; of a layer and token
    assert pure["cache_bytes"] == [4 * state] * 2
    assert hybrid["cache_bytes"] == [3 * state + n * keys_and_values for n in (20, 150)]
    assert llama["cache_bytes"] == [4 * n * keys_and_values for n in (20, 150)]
    for row in (pure, hybrid, llama):
        assert row["ratio"] == row["seconds"][1] / row["seconds"][0] > 0
    assert len(capsys.readouterr().out.splitlines()) == 4 + 3


def test_training_steps(run: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["model"]: row for row in run("bench_training_step", "--tokens", "48")}
    assert list(rows) == ["Llama (SDPA)", *MODELS[:2]]  # Llama first, as all ratios are to it
    assert rows["Llama (SDPA)"]["ratio"] == 1
    sizes = [row["parameters"] for row in rows.values()]
    assert max(sizes) < 1.1 * min(sizes)
    assert len(capsys.readouterr().out.splitlines()) == 4 + 3
