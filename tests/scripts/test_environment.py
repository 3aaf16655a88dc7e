"""scripts/environment.sh: the build of torch for a machine, the announced downloads, and repeated calls."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from linear_llama3.trainer.recipes.recipe import load_recipe

ROOT = Path(__file__).parents[2]
LOCAL, PLAIN, CPU = "--no-index --no-deps torch", "constraints.txt torch", "uv pip install --torch-backend cpu"


class Machine:
    """A checkout whose python, uv and nvidia-smi only record how they are called."""

    def __init__(self, folder: Path, *, gpu: bool = False, wheel: bool = False, index: bool = True) -> None:
        self.folder, self.calls = folder, folder / "calls"
        programs = folder / ".venv/bin"
        programs.mkdir(parents=True)
        record = f'echo "$(basename "$0") $*" >>{self.calls}'
        answers = {
            "python": f'case "$*" in *--no-index*) exit {int(not wheel)};; esac',
            "uv": f"exit {int(not index)}",
            "nvidia-smi": f"[ {int(gpu)} = 1 ] && echo 'GPU 0: NVIDIA H200'",
            "uname": "echo Linux",
            "accelerate": "",
            "linear-llama3": "",
        }
        for name, answer in answers.items():
            (programs / name).write_text(f"#!/bin/sh\n{record}\n{answer}\n")
            (programs / name).chmod(0o755)
        (programs / "activate").write_text(f"PATH={programs}:$PATH")
        (folder / "scripts").mkdir()
        for name in ("scripts/environment.sh", "scripts/quickstart.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder / name)

    def install(self, what: str) -> tuple[list[str], str]:
        """Return the calls of pip and uv, and the output."""
        calls, printed = self.run("-euo", "pipefail", "-c", f'source scripts/environment.sh "{what}"')
        return [call for call in calls if "install" in call], printed

    def run(self, *arguments: str) -> tuple[list[str], str]:
        """Return the calls of a bash script, and the output."""
        self.calls.write_text("")
        done = subprocess.run(["bash", *arguments], cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return self.calls.read_text().splitlines(), done.stdout


@pytest.mark.parametrize(
    ("machine", "ways", "said"),
    [
        ({"gpu": True, "wheel": True}, [PLAIN], "PyTorch with CUDA: a download of about 2.8 GB"),
        ({"wheel": True}, [LOCAL], ""),
        ({}, [LOCAL, "--quiet uv", CPU], "CPU build of PyTorch: a download of about 200 MB"),
        ({"index": False}, [LOCAL, "--quiet uv", CPU, PLAIN], "the default build instead.* 2.8 GB"),
    ],
    ids=["GPU", "local wheel", "PyTorch's CPU index", "no CPU index"],
)
def test_the_build_of_torch_suits_the_machine(
    tmp_path: Path, machine: dict[str, bool], ways: list[str], said: str
) -> None:
    calls, printed = Machine(tmp_path, **machine).install(".")
    assert len(calls) == len(ways) + 1 and calls[-1].endswith("--editable .")
    for call, way in zip(calls, ways, strict=False):
        assert way in call and "--constraint constraints.txt" in call
    assert re.search(said, " ".join(printed.splitlines()))


def test_repeated_calls_install_only_changes(tmp_path: Path) -> None:
    """Test tools are added to the package. Asking for the package alone afterwards installs and removes nothing."""
    machine = Machine(tmp_path, wheel=True)
    for what, installs in [(".", True), (".", False), (".[dev]", True), (".[dev]", False), (".", False)]:
        calls, _ = machine.install(what)
        assert bool(calls) == installs and (not calls or calls[-1].endswith(f"--editable {what}"))
    with (tmp_path / "constraints.txt").open("a") as pins:
        pins.write("click==8.5.1\n")
    assert machine.install(".")[0] and machine.install(".[dev]")[0] and not machine.install(".")[0]


@pytest.mark.parametrize(
    ("script", "what"), [("scripts/quickstart.sh", "."), ("scripts/test.sh", ".[dev]"), (".ci/run", ".[dev]")]
)
def test_scripts_install_what_they_need(script: str, what: str) -> None:
    assert f'source scripts/environment.sh "{what}"' in (ROOT / script).read_text().splitlines()


OVERWRITE = " training.overwrite_output_dir=true"  # of the training alone: the quickstart can be repeated


def test_the_fast_quickstart_uses_one_smaller_recipe(tmp_path: Path) -> None:
    """Both comparisons and the training use the smaller recipe; the user's changes override it."""
    machine, recipe, changed = Machine(tmp_path, wheel=True), "scripts/recipes/quickstart.yaml", "training.max_steps=9"
    runs = {}
    for flags in ((), ("--fast",)):
        calls, printed = machine.run("scripts/quickstart.sh", *flags, changed)
        changes = {call.split(recipe)[1].replace(OVERWRITE, "") for call in calls if recipe in call}
        assert sum(recipe in call for call in calls) == 3 and len(changes) == 1
        runs[flags] = load_recipe(ROOT / recipe, changes.pop().split())
        assert all(f"== {step} of 4. " in printed for step in range(1, 5)) and printed.count("(about ") == 4
    full, fast = runs.values()
    assert full == load_recipe(ROOT / recipe, [changed]) and fast.training["max_steps"] == 9
    assert fast.sequence_length < full.sequence_length and fast.model["hidden_size"] < full.model["hidden_size"]
