"""The documentation against the code: links, commands, options, recipe keys, imports, names and versions."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from linear_llama3 import LinearLlama3Config
from linear_llama3.cli import app
from linear_llama3.ops.feature_maps import FEATURE_MAPS
from linear_llama3.sequence_parallel import LAYOUTS, LINEAR_STRATEGIES, SOFTMAX_STRATEGIES
from linear_llama3.trainer import LinearLlama3TrainingArguments
from linear_llama3.trainer.recipes import recipe as recipes
from scripts import recipe_reference
from tests.helpers import markdown
from tests.helpers.markdown import ROOT, Block

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MIXERS = importlib.import_module(LinearLlama3Config.__module__).MIXERS
COMMANDS = {(page, shlex.join(words)): words for page, words in markdown.commands()}
PYTHON = markdown.blocks("python")
LONGEST_CELL = 200


def ids(values: Any) -> list[str]:
    return [f"{page}: {command}" for page, command in values]


# Pages


@pytest.mark.parametrize("page", markdown.pages())
def test_every_relative_link_and_anchor_resolves(page: str) -> None:
    path = ROOT / page
    for link in markdown.links(markdown.read(page)):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{page} links to {link}, which does not exist"
        if anchor:
            assert anchor in markdown.anchors(target.read_text(encoding="utf-8")), f"{page} links to {link}: no heading"


@pytest.mark.parametrize("page", markdown.pages())
def test_no_table_cell_is_longer_than_a_reader_bears(page: str) -> None:
    shown = [re.sub(r"\]\([^)]*\)", "]", cell) for row in markdown.table_rows(markdown.read(page)) for cell in row]
    assert [cell for cell in shown if len(cell) > LONGEST_CELL] == []


def test_readme_is_a_front_page() -> None:
    readme = markdown.read("README.md")
    assert len(readme.splitlines()) <= 150
    for command in ("bash scripts/quickstart.sh", "bash scripts/test.sh"):
        assert re.search(rf"^{command}( |$)", readme, re.MULTILINE), f"README.md does not show `{command}`"


def test_every_page_is_in_the_index_the_readme_and_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").glob("*.md")):
        assert f" {path.name}\n" in site, f"mkdocs.yml does not list {path.name}"
        if path.name != "index.md":
            assert f"({path.name}" in markdown.read("docs/index.md"), f"docs/index.md does not link to {path.name}"
            assert f"(docs/{path.name}" in markdown.read("README.md"), f"README.md does not link to docs/{path.name}"


def test_recipe_reference_is_up_to_date() -> None:
    assert recipe_reference.PAGE.read_text(encoding="utf-8") == recipe_reference.page(), (
        "docs/recipe_reference.md does not match the dataclasses; run `python scripts/recipe_reference.py`"
    )


# Names


def sections_of(page: str) -> dict[str, list[str]]:
    """Return for each heading the names in code at the start of its table rows."""
    sections = {}
    for section in re.split(r"^#+ ", markdown.read(page), flags=re.MULTILINE)[1:]:
        rows = markdown.table_rows(section)
        sections[section.splitlines()[0]] = [found[1] for row in rows if (found := re.match(r"\[?`(\w+)`", row[0]))]
    return sections


def test_tables_list_every_strategy_mixer_layout_and_feature_map() -> None:
    tables = sections_of("docs/sequence_parallelism.md")
    assert tables["Linear layers"] == list(LINEAR_STRATEGIES)
    assert tables["Softmax layers"] == list(SOFTMAX_STRATEGIES)
    assert set(LAYOUTS) <= set(re.findall(r"^- `(\w+)`", markdown.read("docs/sequence_parallelism.md"), re.MULTILINE))
    assert sections_of("docs/models.md")["Mixers and feature maps"] == list(MIXERS)
    models = markdown.read("docs/models.md")
    assert [name for name in FEATURE_MAPS if f"`{name}`" not in models] == []
    assert [name for name in MIXERS if f"`{name}`" not in markdown.read("README.md")] == []


def supported(name: str) -> str:
    """Return the releases that pyproject.toml admits, as in "torch 2.11 to 2.14"."""
    (requirement,) = [line for line in PROJECT["dependencies"] if re.match(rf"{name}\b", line)]
    first, major, beyond = re.findall(r">=([\d.]+),<(\d+)\.(\d+)", requirement)[0]
    last = f"{major}.{int(beyond) - 1}"
    return f"{name} {first}" if first == last else f"{name} {first} to {last}"


@pytest.mark.parametrize("page", ["README.md", "docs/compatibility.md"])
def test_supported_versions_are_those_of_pyproject(page: str) -> None:
    text = " ".join(markdown.read(page).split())
    assert f"Python {PROJECT['requires-python'].strip('>=')} or later" in text
    for name in ("torch", "transformers", "accelerate"):
        releases = supported(name)
        assert re.search(rf"{re.escape(releases)}(?![\d.]*\d| to)", text), f"{page} does not say {releases}"


def test_tool_versions_are_those_of_the_tests() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    rows = [row for row in markdown.table_rows(markdown.read("docs/compatibility.md")) if "tests/ecosystem" in row[0]]
    assert len(rows) == 5
    for row in rows:
        name, version = row[1].split()
        assert pins[name] == version


# Python


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}-{PYTHON.index(block)}")
def test_python_block_compiles_and_its_names_exist(block: Block) -> None:
    tree = ast.parse(block.code)
    imported: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                top = alias.name.split(".")[0]
                imported[alias.asname or top] = module if alias.asname else importlib.import_module(top)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                imported[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            assert hasattr(imported[node.value.id], node.attr), f"{node.value.id} has no {node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(imported[node.func.id]).bind_partial(**keywords)


def test_planner_block_plans_what_its_comment_says() -> None:
    (block,) = [block for block in PYTHON if "load_profile" in block.code]
    values: dict[str, Any] = {}
    exec(block.code, values)
    assert [str(batch) for batch in values["step"].micro_batches] == ["<8, 4 x 2>"]


# Commands


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
        if words[1].startswith("linear_llama3.commands"):
            check_cli([words[1].rsplit(".", 1)[1].replace("evaluation", "evaluate"), *words[2:]])
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


@pytest.mark.parametrize("words", COMMANDS.values(), ids=ids(COMMANDS))
def test_command_is_accepted_by_the_program_that_it_starts(words: list[str]) -> None:
    if words[0] not in OF_OTHERS:
        assert words[0] in CHECKS, f"a program that this test does not know: {words[0]}"
        CHECKS[words[0]](words[1:])


def test_extras_named_in_the_text_exist() -> None:
    for page in markdown.pages():
        check_pip([markdown.read(page)])


# Recipes


def keys(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


SECTIONS = {
    "data": keys(recipes.DataRecipe),
    "validation": keys(recipes.ValidationRecipe),
    "sequence_parallel": keys(recipes.SequenceParallelRecipe),
    "model": keys(LinearLlama3Config) | {"preset", *recipes.LOADED_MODEL},
    "training": keys(LinearLlama3TrainingArguments),
}


def check_keys(text: str) -> None:
    content = yaml.safe_load(text)
    assert isinstance(content, dict) and set(content) <= keys(recipes.Recipe), f"unknown recipe keys: {text}"
    for section in set(content) & set(SECTIONS):
        assert set(content[section]) <= SECTIONS[section], f"unknown keys of {section}: {text}"


@pytest.mark.parametrize("block", markdown.blocks("yaml"), ids=lambda block: block.page)
def test_recipe_keys_in_yaml_blocks_exist(block: Block) -> None:
    alternatives = re.split(r" *# or\n", block.code)  # two examples of one section
    for text in alternatives:
        check_keys(text)


def test_recipe_keys_in_the_text_exist() -> None:
    for page in markdown.pages():
        text = markdown.read(page)
        for section, key in re.findall(r"`(data|validation|sequence_parallel|training)\.(\w+)", text):
            if key != "py":
                assert key in SECTIONS[section], f"{page} names {section}.{key}, which is not a recipe key"
        for inline in re.findall(r"`((?:data|validation|sequence_parallel|model|training): \{[^`]*\})`", text):
            check_keys(inline.replace("size: n", "size: 2"))


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
