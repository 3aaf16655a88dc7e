"""The wheel holds the tree and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

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


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
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
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("linear_llama3-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        top_level = next(name for name in archive.namelist() if name.endswith("top_level.txt"))
        assert archive.read(top_level).decode().split() == ["linear_llama3"]
    assert names == set(sources())
