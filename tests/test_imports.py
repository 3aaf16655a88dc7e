"""Imports point one way, and the mathematics knows nothing of process groups."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {  # in the order in which they may import: a room imports itself and those before it
    "ops": ROOT / "linear_llama3" / "ops",
    "sequence_parallel": ROOT / "linear_llama3" / "sequence_parallel",
    "modeling": ROOT / "modeling",
    "trainer": ROOT / "trainer",
}
FILES = [(room, path) for room, folder in ROOMS.items() for path in sorted(folder.rglob("*.py"))]
ROOMS["cli"] = ROOT / "linear_llama3"
FILES += [
    ("cli", path) for path in (ROOT / "linear_llama3/cli.py", *sorted((ROOT / "linear_llama3/commands").glob("*.py")))
]


def imported_modules(room: str, path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, inside functions too."""
    package = ["linear_llama3", *([] if room == "cli" else [room]), *path.relative_to(ROOMS[room]).parent.parts]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize(("room", "path"), FILES, ids=[str(p.relative_to(ROOT)) for _, p in FILES])
def test_imports_point_one_way(room: str, path: Path) -> None:
    order = list(ROOMS)
    for name in imported_modules(room, path):
        parts = name.split(".")
        if parts[0] == "linear_llama3" and len(parts) > 1 and parts[1] in order:
            assert order.index(parts[1]) <= order.index(room), f"{room} must not import {name}"
        assert parts[0] not in order, f"import linear_llama3.{name}, not {name}"


@pytest.mark.parametrize(("room", "path"), FILES, ids=[str(p.relative_to(ROOT)) for _, p in FILES])
def test_collectives_are_called_in_one_file(room: str, path: Path) -> None:
    names = imported_modules(room, path)
    if room in ("ops", "modeling"):
        assert not any(name.startswith("torch.distributed") for name in names)
    if room == "sequence_parallel" and path.name != "collectives.py":
        calls = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist"
        }
        assert calls <= {"ProcessGroup"}, "collectives belong in collectives.py"
