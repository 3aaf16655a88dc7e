"""Every example runs as its docstring says; on several processes it prints the numbers of one."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import run_distributed
from tests.helpers.training import reset_accelerate

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def documented_commands(script: str) -> list[list[str]]:
    """Return the commands of a script's docstring that start the script, without comments."""
    docstring = ast.get_docstring(ast.parse((ROOT / "examples" / script).read_text(encoding="utf-8"))) or ""
    lines = re.findall(r"^    ((?:python|torchrun) .*)$", docstring, re.MULTILINE)
    return [line.partition("#")[0].split() for line in lines]


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder that holds the examples, and return its output."""
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    programs = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def printed_losses(output: str) -> list[float]:
    """Return the losses in lines such as `step 3: loss 4.1234` and `losses: 5.2 4.1`."""
    lines = re.findall(r"^(?:losses|step \d+|loss of a row).*$", output, re.MULTILINE)
    return [float(number) for line in lines for number in re.findall(r"\d+\.\d+", line)]


def run_in_worker(path: str, folder: str) -> str:
    os.chdir(folder)
    reset_accelerate()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(path, run_name="__main__")
    reset_accelerate()
    return output.getvalue()


def test_the_trainer_example_learns_on_two_processes(tmp_path: Path) -> None:
    outputs = run_distributed(run_in_worker, 2, str(ROOT / "examples/trainer.py"), str(tmp_path))
    losses = printed_losses(outputs[0])
    assert len(losses) == 4 and losses[-1] < losses[0] - 1
    assert (tmp_path / "runs/examples/trainer/model.safetensors").is_file()


def test_examples_state_their_commands_and_are_short() -> None:
    assert len(SCRIPTS) == 5
    for script in SCRIPTS:
        assert all(f"examples/{script}" in command for command in documented_commands(script))
        assert documented_commands(script), f"{script} states no command"
        assert len((ROOT / "examples" / script).read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_documented_commands_print_the_same_losses(script: str, tmp_path: Path) -> None:
    outputs = [run(command, tmp_path) for command in documented_commands(script)]
    losses = [printed_losses(output) for output in outputs]
    assert all(loss[0] == pytest.approx(losses[0][0], rel=1e-5) for loss in losses if loss)
    assert all(loss == pytest.approx(losses[0], rel=1e-2) for loss in losses)
    expected = "train/tokens_per_second" if script == "tensorboard_logging.py" else "continued on one"
    assert losses[0] or expected in outputs[0]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples/notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()


def test_the_notebook_holds_its_outputs_and_is_small() -> None:
    path = ROOT / "examples/notebook.ipynb"
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert path.stat().st_size < 200_000
    assert all(cell["execution_count"] for cell in cells)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
