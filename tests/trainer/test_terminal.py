"""Noise kept off the terminal: profiler lines, warnings about other packages, one report per process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

from linear_llama3.trainer.recipes.build import build_model
from linear_llama3.trainer.recipes.recipe import load_recipe
from tests.helpers.recipes import recipe_with, write_tokenizer

LOADING = logging.getLogger("transformers.modeling_utils")


@pytest.fixture
def transformers_settings() -> Iterator[None]:
    yield
    LOADING.setLevel(logging.NOTSET)
    transformers.logging.enable_progress_bar()


@pytest.mark.slow
def test_measuring_memory_prints_nothing() -> None:
    code = """
import torch
from linear_llama3.trainer.memory.peak import allocated_peak
for _ in range(2):
    print(allocated_peak(lambda: torch.zeros(2**20)))
"""
    environment = {name: x for name, x in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [str(4 * 2**20)] * 2 and done.stderr == ""


def test_adapters_come_without_warnings(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        build_model(load_recipe(recipe_with(tmp_path, lora={"r": 2})), tokenizer)
    assert not [str(warning.message) for warning in found if issubclass(warning.category, FutureWarning)]


@pytest.mark.usefixtures("transformers_settings")
def test_one_process_reports_what_weights_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    build_model(load_recipe(recipe_with(tmp_path)), tokenizer).save_pretrained(str(tmp_path / "model"))
    weights = load_file(path := tmp_path / "model" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    recipe = load_recipe(recipe_with(tmp_path, model={"name_or_path": str(tmp_path / "model")}))
    monkeypatch.setattr(LOADING, "handlers", [caplog.handler])
    for rank, reports in (("0", True), ("1", False)):
        caplog.clear()
        monkeypatch.setenv("RANK", rank)
        build_model(recipe, tokenizer)
        assert ("model.layers.1.mlp.up_proj.weight" in caplog.text) == reports
