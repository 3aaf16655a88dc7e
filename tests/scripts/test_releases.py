"""The ends of the dependency ranges."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement

from scripts.release_constraints import constraints

ROOT = Path(__file__).resolve().parent.parent.parent
GUARDED = {"torch", "transformers", "accelerate", "trl", "peft"}  # whose interfaces the package overrides or reads


def test_oldest_is_the_lower_end_of_every_range() -> None:
    lines = dict(line.split("==") for line in constraints("oldest"))
    assert lines["transformers"] == "5.17.*" and lines["torch"] == "2.11.*" and lines["trl"] == "1.16.*"
    assert constraints("newest") == []
    assert "torch==2.13.0" in constraints("newest", torch="2.13.0")


def test_ranges_of_guarded_libraries_have_both_ends() -> None:
    lines = {Requirement(line).name: line for line in constraints("oldest")}
    assert lines.keys() >= GUARDED
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in text.splitlines():
        if any(line.strip().startswith(f'"{name}>') for name in GUARDED):
            requirement = Requirement(line.strip().strip('",'))
            assert {part.operator for part in requirement.specifier} == {">=", "<"}, line


def test_the_hosted_matrix_has_both_ends() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["releases"]["strategy"]["matrix"]["release"] == ["oldest", "newest"]


@pytest.mark.slow
@pytest.mark.parametrize("release", ["oldest", "newest"])
def test_models_generation_and_training_on_both_ends(release: str) -> None:
    torch_release = os.environ.get("TORCH", torch.__version__.partition("+")[0])  # avoid a second build of torch
    environment = os.environ | {"TORCH": torch_release}
    subprocess.run(["bash", "scripts/test_releases.sh", release], cwd=ROOT, env=environment, check=True)
