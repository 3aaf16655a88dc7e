"""The wheel holds the tree and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FOLDERS = {"": ROOT / "linear_llama3"} | {n: ROOT / n for n in ("modeling", "trainer", "model_cards")}


def sources() -> dict[str, Path]:
    """Every file of the package by its name in the wheel, links not followed twice."""
    found = {}
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            linked = not name and inside.parts[0] in ("modeling", "trainer")
            if path.suffix in (".py", ".typed", ".md", ".json") and not linked:
                found[str(Path("linear_llama3") / name / inside)] = path
    return found


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    listed = pyproject()["tool"]["setuptools"]["packages"]
    packages = {str(Path(name).parent).replace("/", ".") for name in sources() if not name.endswith(".typed")}
    assert sorted(listed) == sorted(packages)


@pytest.mark.parametrize("name", ["modeling", "trainer"])
def test_links_lead_to_the_folders(name: str) -> None:
    link = ROOT / "linear_llama3" / name
    if not link.is_symlink():
        pytest.skip("a checkout without links")
    assert link.resolve() == ROOT / name


def test_the_folders_are_not_packages_of_their_own() -> None:
    for name in ("modeling", "trainer"):
        code = f"import {name}"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert f"import linear_llama3.{name}, not {name}" in done.stderr


def test_the_wheel_holds_the_tree(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack what an earlier build left there
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("linear_llama3-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        top_level = next(name for name in archive.namelist() if name.endswith("top_level.txt"))
        assert archive.read(top_level).decode().split() == ["linear_llama3"]
    assert names == set(sources())


def test_pins_are_of_our_dependencies_and_within_their_ranges() -> None:
    """Triton is not pinned: torch's CUDA builds require their own release, and pip would find no solution."""
    project = pyproject()["project"]
    listed = [
        *project["dependencies"],
        *(item for items in project["optional-dependencies"].values() for item in items),
    ]
    ranges = {(need := Requirement(item)).name: need.specifier for item in listed}
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert pins and "triton" not in dict(pins)
    for name, version in pins:
        assert version in ranges[name], f"{name}=={version} of constraints.txt is outside {ranges[name]}"


def resolve(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Return what pip would install from the public index, without local wheels and settings."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", *arguments]
    settings = {name: x for name, x in os.environ.items() if name != "PIP_FIND_LINKS"} | {"PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "[test]", "[bench]"])
def test_pip_finds_a_solution_on_the_public_index(extra: str) -> None:
    """If the index has no separate metadata, pip downloads the wheels to read it: about 3 GB per case."""
    if (probe := resolve("--no-deps", "setuptools")).returncode:
        pytest.skip(f"the package index cannot be reached: {probe.stderr.strip().splitlines()[-1]}")
    done = resolve("--constraint", "constraints.txt", f".{extra}")
    assert done.returncode == 0, done.stderr
    planned = done.stdout.splitlines()[-1]
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if name in ("torch", "transformers", "accelerate"):
            assert f" {name}-{version} " in planned
