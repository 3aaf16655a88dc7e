"""The commands in the documentation: their programs accept them, and they run on small data."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from linear_llama3.cli import app
from linear_llama3.trainer.recipes import recipe as recipes
from tests.helpers import markdown
from tests.helpers.markdown import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS = {(page, shlex.join(words)): words for page, words in markdown.commands()}
PYTHON = markdown.blocks("python")


def check_options(source: Path, words: list[str]) -> None:
    text = source.read_text(encoding="utf-8")
    for word in words:
        if word.startswith("--"):
            assert f'"{word.split("=")[0]}"' in text, f"{source.name} has no option {word}"


def module_file(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"there is no module {name}"
    if spec.submodule_search_locations is not None:
        return module_file(f"{name}.__main__")
    return Path(spec.origin)


def check_recipe(words: list[str]) -> None:
    """Check the recipe and its changes in the words of a command."""
    files = [word for word in words if word.endswith(".yaml")]
    if files and files[0] != "RECIPE.yaml":
        recipes.load_recipe(ROOT / files[0], [word for word in words if re.match(r"[\w.]+=", word)])


def check_cli(words: list[str]) -> None:
    command = typer.main.get_command(app)
    assert words[0] in command.commands, f"linear-llama3 has no command {words[0]}"  # type: ignore[attr-defined]
    subcommand = command.commands[words[0]]  # type: ignore[attr-defined]
    subcommand.make_context(words[0], words[1:])
    check_recipe(words)


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        if words[1] == "pytest":
            assert all((ROOT / word).exists() for word in words[2:] if not word.startswith("-"))
            return
        if words[1] == "linear_llama3.cli":
            check_cli(words[2:])
            return
        check_options(module_file(words[1]), words[2:])
    else:
        assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
        check_options(ROOT / words[0], words[1:])
    check_recipe(words)


def check_launch(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    parsed = launch_command_parser().parse_args(
        [{"$RANK": "0", "$FIRST": "127.0.0.1"}.get(word, word) for word in words[1:]]
    )
    check_python(["-m"] * bool(parsed.module) + [parsed.training_script, *parsed.training_script_args])


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(words)
    check_python(["-m"] * bool(parsed.module) + [parsed.training_script, *parsed.training_script_args])


def check_bash(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
    for word in words[1:]:
        assert not word.startswith("--") or word in (ROOT / words[0]).read_text(), f"{words[0]} has no {word}"
    check_recipe(["scripts/recipes/quickstart.yaml", *words[1:]])


def check_pip(words: list[str]) -> None:
    for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), f"there is no extra {extras}"


def check_source(words: list[str]) -> None:
    assert words == [".venv/bin/activate"] and ".venv/bin/activate" in (ROOT / "scripts/environment.sh").read_text()


CHECKS = {
    "source": check_source,
    "linear-llama3": check_cli,
    "python": check_python,
    "accelerate": check_launch,
    "torchrun": check_torchrun,
    "bash": check_bash,
    "pip": check_pip,
}
OF_OTHERS = {"transformers", "mkdocs", "git", "cd", "ruff", "mypy"}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=[f"{page}: {text}" for page, text in COMMANDS])
def test_command_is_accepted_by_the_program_that_it_starts(words: list[str]) -> None:
    if words[0] not in OF_OTHERS:
        assert words[0] in CHECKS, f"a program that this test does not know: {words[0]}"
        CHECKS[words[0]](words[1:])


def test_extras_named_in_the_text_exist() -> None:
    for page in markdown.pages():
        check_pip([markdown.read(page)])


# Slow: every command that needs no GPU, no server and no terminal


FEW = "data.files=runs/quickstart/corpus/a*"
SMALL = {  # what a command of the documentation is scaled down with
    "quickstart.yaml": [FEW, "training.max_steps=2", "sequence_length=256", "training.overwrite_output_dir=true"],
    "long_context.yaml": [FEW, "training.max_steps=1", "sequence_length=512"],
    "adaptive.yaml": [FEW, "training.max_steps=2", "sequence_length=256"],
}
SKIPPED = {"serve", "chat", "profile"}  # the first two wait for input (see tests/commands); `workspace` runs the last


def runnable() -> dict[str, list[str]]:
    """Return the commands of `linear-llama3` that run by themselves on the files of `workspace`."""
    found = {shlex.join(words): words[1:] for words in COMMANDS.values() if words[0] == "linear-llama3"}
    return {text: words for text, words in found.items() if words[0] not in SKIPPED and "RECIPE.yaml" not in words}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small version of what the quickstart leaves."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "LONG_TEXT.txt").write_text((ROOT / "linear_llama3" / "cli.py").read_text() * 8)  # more than a row
    subprocess.run([sys.executable, "scripts/quickstart_data.py", "runs/quickstart"], cwd=folder, check=True)
    run(["train", "scripts/recipes/quickstart.yaml"], folder)
    run(["profile", "scripts/recipes/adaptive.yaml", "runs/quickstart/profile.json"], folder)
    return folder


def run(words: list[str], folder: Path) -> str:
    small = next((changes for name, changes in SMALL.items() for word in words if word.endswith(name)), [])
    small = [] if "--dry-run" in words else small
    command = [sys.executable, "-m", "linear_llama3.cli", *words, *small]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("words", runnable().values(), ids=list(runnable()))
def test_command_runs(words: list[str], workspace: Path) -> None:
    run(words, workspace)


@pytest.mark.slow
def test_ten_lines_of_python_run_on_two_processes(workspace: Path) -> None:
    (block,) = [block for block in PYTHON if block.page == "README.md"]
    (workspace / "example.py").write_text(block.code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "example.py"]
    subprocess.run(command, cwd=workspace, check=True, timeout=580)


@pytest.mark.slow
def test_memory_block_prints_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for block in PYTHON if block.page == "docs/memory.md"]
    exec(block.code, {})
    assert "total" in capsys.readouterr().out


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True)
