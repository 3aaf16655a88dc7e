"""The documentation against the code: links, recipe keys, imports, names and versions."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import tomllib
from typing import Any

import pytest
import yaml

from linear_llama3 import LinearLlama3Config
from linear_llama3.ops.feature_maps import FEATURE_MAPS
from linear_llama3.sequence_parallel import LAYOUTS, LINEAR_STRATEGIES, SOFTMAX_STRATEGIES
from linear_llama3.trainer import LinearLlama3TrainingArguments
from linear_llama3.trainer.recipes import recipe as recipes
from scripts import recipe_reference
from tests.helpers import markdown
from tests.helpers.markdown import ROOT, Block

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MIXERS = importlib.import_module(LinearLlama3Config.__module__).MIXERS
PYTHON = markdown.blocks("python")
LONGEST_CELL = 200


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
    assert [str(batch) for batch in values["step"].micro_batches] == ["<8 x 2>"]


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
