"""Imports point one way, no modules import each other, and the mathematics knows nothing of process groups."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "linear_llama3"
ROOMS = {  # in the order in which they may import: a room imports itself and those before it
    "ops": PACKAGE / "ops",
    "sequence_parallel": PACKAGE / "sequence_parallel",
    "modeling": ROOT / "modeling",
    "trainer": ROOT / "trainer",
}
TOP = "commands and cli"


def modules() -> dict[str, Path]:
    """Every module of the package by name."""
    found: dict[str, Path] = {}
    for room, folder in ROOMS.items():
        found |= {f"linear_llama3.{room}" + _dotted(path.relative_to(folder)): path for path in folder.rglob("*.py")}
    rest = [*PACKAGE.glob("*.py"), *(PACKAGE / "commands").glob("*.py")]
    return found | {"linear_llama3" + _dotted(path.relative_to(PACKAGE)): path for path in rest}


def _dotted(path: Path) -> str:
    return "".join(f".{part}" for part in path.with_suffix("").parts if part != "__init__")


MODULES = modules()


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else TOP


def imported_names(module: str) -> Iterator[str]:
    """Absolute names of everything that a module imports, inside functions and under TYPE_CHECKING too."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def imported_modules(module: str) -> set[str]:
    """The modules of the package that a module imports: the submodule that a name stands for, or its package."""
    names = {name if name in MODULES else name.rpartition(".")[0] for name in imported_names(module)}
    return names & set(MODULES)


def test_imports_point_one_way() -> None:
    order = [*ROOMS, TOP]
    for module in MODULES:
        for name in imported_names(module):
            assert name.split(".")[0] not in ROOMS, f"{module}: import linear_llama3.{name}, not {name}"
        for other in imported_modules(module):
            if other != "linear_llama3":  # version and lazy names
                assert order.index(room_of(other)) <= order.index(room_of(module)), f"{module} must not import {other}"


@pytest.mark.parametrize("room", [*ROOMS, TOP])
def test_no_modules_import_each_other(room: str) -> None:
    graph = {module: imported_modules(module) for module in MODULES if room_of(module) == room}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import circle: " + " <- ".join(error.args[1]))


def test_the_mathematics_knows_no_process_groups() -> None:
    for module in MODULES:
        if room_of(module) in ("ops", "modeling"):
            assert not any(name.startswith("torch.distributed") for name in imported_names(module)), module


def test_collectives_are_called_in_one_file() -> None:
    for module, path in MODULES.items():
        if room_of(module) != "sequence_parallel" or path.name == "collectives.py":
            continue
        calls = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist"
        }
        assert calls <= {"ProcessGroup"}, f"{module}: collectives belong in collectives.py"
