"""The command `linear-llama3`: its processes, their arguments, and mistakes that it finds before it starts them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
import yaml
from accelerate.commands import launch as accelerate_launch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner

import linear_llama3
from linear_llama3 import cli
from linear_llama3.commands import launching
from linear_llama3.trainer import __main__ as training
from linear_llama3.trainer import launched
from linear_llama3.trainer.adaptive import profiling
from linear_llama3.trainer.recipes.recipe import load_recipe
from tests.helpers.recipes import recipe_with, write_corpus, write_tokenizer

ROOT = Path(__file__).parents[1]
measure = profiling.main


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    """Create the files that `recipe_with` names."""
    write_corpus(tmp_path / "corpus")
    write_tokenizer(tmp_path / "tokenizer")


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """The command sets variables of the process that it becomes."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


class Replaced(Exception):
    """The process has become another one."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return the arguments of the work that would start in this process: training, or measuring a profile."""
    found: list[tuple[Any, ...]] = []
    for module in (training, profiling):
        monkeypatch.setattr(module, "main", lambda *arguments: found.append(arguments))
    for name in (*launched.SIZES, *launched.TORCH_LAUNCH, "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return found


@pytest.mark.parametrize(
    ("devices", "recipe", "planned", "expected"),
    [
        (0, {}, False, (False, 1)),
        (0, {"processes": 4}, False, (False, 4)),
        (8, {}, False, (True, 8)),
        (8, {"processes": 2}, False, (True, 2)),
        (8, {"training": {"use_cpu": True}}, False, (False, 1)),
        (8, {"training": {"use_cpu": True}, "processes": 3}, False, (False, 3)),
        (0, {}, True, (True, 1)),
        (0, {"processes": 64}, True, (True, 64)),
        (0, {"processes": 2, "training": {"use_cpu": True}}, True, (False, 2)),
    ],
)
def test_number_of_processes(
    devices: int,
    recipe: dict[str, Any],
    planned: bool,
    expected: tuple[bool, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    loaded = load_recipe(recipe_with(tmp_path, **{"training": {}, **recipe}))
    assert cli.place_recipe(loaded, planned=planned) == expected


def test_more_processes_than_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    done = run("train", recipe_with(tmp_path, processes=4, training={}))
    assert "error: every process needs its own GPU, got processes: 4 and 2 visible GPUs" in str(done.exception)


def test_a_single_process_is_this_one(
    tmp_path: Path, started: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several visible GPUs the process starts again with one of them: CUDA reads the variable only once."""

    def execv(path: str, arguments: list[str]) -> None:
        assert arguments == [path, "-m", "linear_llama3.cli", "train", "recipe.yaml"] and path == sys.executable
        raise Replaced

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["linear-llama3", "train", "recipe.yaml"])
    recipe = recipe_with(tmp_path)
    assert run("train", recipe, "sequence_length=32").exit_code == 0
    assert started == [(recipe, ["sequence_length=32"])]
    assert os.environ["ACCELERATE_USE_CPU"] == "true" and "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,1,2")
    changes = ["training.use_cpu=false", "processes=1"]
    assert isinstance(run("train", recipe, *changes).exception, Replaced)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5" and "ACCELERATE_USE_CPU" not in os.environ
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert run("train", recipe, *changes).exit_code == 0
    assert started[1:] == [(recipe, changes)]


def test_under_torchrun_the_command_does_its_work(
    tmp_path: Path, started: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    run("train", "any.yaml", "processes=2")
    run("profile", "any.yaml", "any.json", "processes=2")
    assert started == [(Path("any.yaml"), ["processes=2"]), (Path("any.yaml"), Path("any.json"), ["processes=2"])]


def test_variables_of_another_launch_are_removed(
    tmp_path: Path, started: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch of one process counts as none, so the recipe sets the number. Half a launch of eight is an error."""
    launches: list[int] = []

    def launch(processes: int, *, gpu: bool) -> None:
        launches.append(processes)
        raise Replaced

    monkeypatch.setattr(launching, "launch", launch)
    for processes in (1, 2):
        for name in launched.TORCH_LAUNCH:
            monkeypatch.setenv(name, "1")
        run("train", recipe_with(tmp_path), f"processes={processes}")
        assert not os.environ.keys() & set(launched.TORCH_LAUNCH), "accelerate would join what is not there"
    assert launches == [2] and len(started) == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    done = run("train", recipe_with(tmp_path), "processes=2")
    assert "error: a launch sets RANK together with WORLD_SIZE, got WORLD_SIZE=8" in str(done.exception)
    assert launches == [2] and len(started) == 1


def test_accelerate_receives_processes_and_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal becomes an exit code."""
    given: list[Any] = []

    def launch_command(arguments: Any) -> None:
        given.append(arguments)
        raise SignalException("stopped", signal.SIGTERM)

    monkeypatch.setattr(accelerate_launch, "launch_command", launch_command)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["linear-llama3", "train", "recipe.yaml", "sequence_length=32"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    recipe = recipe_with(tmp_path, training={}, processes=3)
    assert run("train", recipe, "sequence_length=32").exit_code == 128 + signal.SIGTERM
    assert run("train", recipe, "processes=2", "training.use_cpu=true").exit_code == 128 + signal.SIGTERM
    gpu, cpu = given
    assert (gpu.num_processes, gpu.num_machines, gpu.main_process_port, gpu.gpu_ids) == (3, 1, 0, "all")
    assert gpu.module and gpu.training_script == "linear_llama3.cli"
    assert gpu.training_script_args == ["train", "recipe.yaml", "sequence_length=32"]
    assert gpu.num_cpu_threads_per_process is None and gpu.shutdown_timeout == 300
    assert (cpu.num_processes, cpu.num_cpu_threads_per_process) == (2, 3)


def command(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    line = [sys.executable, "-m", "linear_llama3.cli", *map(str, arguments)]
    return subprocess.run(line, env=os.environ | variables, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_launch_that_fails_prints_one_error_and_no_traceback(tmp_path: Path) -> None:
    """An error that only the processes can find: its message once, their exit code, and no traceback."""
    changes = ["processes=2", "training.load_best_model_at_end=true", "training.save_strategy=steps"]
    done = command("train", recipe_with(tmp_path), *changes, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert done.stderr.count("requires the save and eval strategy to match") == 1, done.stderr
    assert re.search(r"error: process 0 of 2 ended with exit code 1; its message is above\n$", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("exit_code", "expected"),
    [
        (3, (3, "ended with exit code 3; its message is above")),
        (-signal.SIGKILL, (137, "was killed .signal 9., probably .* ran out of memory; .*--dry-run` computes")),
        (-signal.SIGSEGV, (139, "was ended by signal 11 .Segmentation fault.")),
    ],
)
def test_the_end_of_a_process_is_described(
    exit_code: int,
    expected: tuple[int, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def launch_command(arguments: Any) -> None:
        raise ChildFailedError("train", {1: ProcessFailure(1, 99, exit_code, str(tmp_path / "none"))})

    monkeypatch.setattr(accelerate_launch, "launch_command", launch_command)
    with pytest.raises(SystemExit) as ended:
        launching.launch(2, gpu=False)
    assert ended.value.code == expected[0]
    assert re.search(f"^error: process 1 of 2 {expected[1]}", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.yaml"], "error: a recipe must be a YAML file, got 'no.yaml', which does not exist"),
        (["recipe.yaml", "modle.hidden_size=3"], "error: unknown key 'modle' in recipe"),
        (
            ["recipe.yaml", "--dry-run", "sequence_parallel.size=3", "processes=2"],
            "got 3 for 2; launch a multiple",
        ),
        (
            ["recipe.yaml", "--dry-run", "sequence_parallel={size: adaptive, profile: p.json}", "data.packing=none"],
            "a dry run describes one degree, got size: adaptive",
        ),
        (["recipe.yaml", "--dry-run", "tokenizer=none"], "tokenizer must be a folder or a Hub name"),
        (["recipe.yaml", "tokenizer=none"], "error: tokenizer must be a folder or a Hub name"),
        (["recipe.yaml", "sequence_parallel.size=3", "processes=2"], "error: the sequence-parallel degree .* 3 for 2"),
        (["recipe.yaml", "training.output_dir=/proc/nope"], "error: output_dir must be a folder that can be written"),
    ],
)
def test_mistakes_are_found_before_a_launch(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_with(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching, "launch", lambda *_, **__: pytest.fail("launched"))
    assert re.search(message, str(run("train", *arguments).exception))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("profile.txt", "must end in .json, got profile.txt; choose another"),
        ("profile", "must end in .json, got profile; choose another"),
        ("missing/profile.json", "got missing/profile.json, whose folder cannot be written or does not exist; choose"),
        ("folder.json", "got folder.json, which cannot be written; choose another"),
    ],
)
def test_a_profile_that_could_not_be_written_is_not_measured(
    output: str, message: str, tmp_path: Path, started: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr(profiling, "measure_profile", lambda *arguments, **names: pytest.fail("measured"))
    recipe = recipe_with(tmp_path)
    assert message in str(run("profile", recipe, output).exception) and not started
    with pytest.raises(SystemExit, match=re.escape(message)):
        measure(recipe, Path(output))


@pytest.mark.parametrize("name", ["train", "profile", "plan", "evaluate", "needle", "generate", "chat", "serve"])
def test_every_option_and_argument_has_a_help_text(name: str) -> None:
    group: Any = typer.main.get_command(cli.app)
    parameters = group.commands[name].params
    assert parameters and all(parameter.help for parameter in parameters)
    done = run(name, "--help")
    assert done.exit_code == 0 and all(p.help.split()[0] in done.stdout for p in parameters)


def test_help_imports_nothing_that_only_a_run_needs() -> None:
    heavy = ["datasets", "matplotlib", "fastapi", "openai", "transformers.trainer", "linear_llama3.trainer.trainer"]
    code = f"import sys, linear_llama3.cli; print([name for name in {heavy} if name in sys.modules])"
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_version() -> None:
    done = run("--version")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"linear-llama3 {linear_llama3.__version__} (transformers {transformers.__version__}")


def test_presets() -> None:
    done = run("presets", "linear-llama-3.2-1b")
    assert done.exit_code == 0 and "linear-llama-3.2-1b" in done.stdout and "linear-llama-3.1-8b" not in done.stdout
    assert "error: " in str(run("presets", "llama-4").exception)


def test_the_command_is_installed() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'linear-llama3 = "linear_llama3.cli:app"' in project
    for recipe in sorted((ROOT / "scripts/recipes").glob("*.yaml")):
        assert yaml.safe_load(recipe.read_text()), recipe
        load_recipe(recipe)
