"""Checks of record fields by the names of their types, and of output files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

Amount = float  # of seconds or bytes
Positive = float
Count = int
Size = int

LARGEST = sys.float_info.max
LARGEST_COUNT = 2**31  # layers, heads, channels ...: products of them stay finite


def _number(value: object, kind: type, least: float, most: float) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return least <= (value if isinstance(value, int) else float(value)) <= most  # type: ignore[arg-type]


def _size(value: object) -> bool:
    return _number(value, Integral, 1, LARGEST_COUNT)


RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "Amount": ("a finite number, 0 or more", lambda value: _number(value, Real, 0.0, LARGEST)),
    "Positive": ("a finite number above 0", lambda value: _number(value, Real, sys.float_info.min, LARGEST)),
    "Count": ("an integer from 0 to 2**31", lambda value: _number(value, Integral, 0, LARGEST_COUNT)),
    "Size": ("an integer from 1 to 2**31", _size),
    "tuple[Size, Size, Size]": (
        "three integers from 1 to 2**31",
        lambda value: isinstance(value, tuple) and len(value) == 3 and all(map(_size, value)),
    ),
    "Degree": ("a power of two from 2 on", lambda value: _size(value) and value > 1 and value & (value - 1) == 0),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("text", lambda value: isinstance(value, str)),
}


def check(entry: str, kind: str, value: object) -> None:
    """Raise ValueError unless the value follows the rule for its kind; "... | None" also allows None."""
    kind, _, optional = kind.partition(" | ")
    rule, holds = RULES[kind]
    if not (holds(value) or (optional and value is None)):
        raise ValueError(f"{entry} must be {rule}{' (or null)' if optional else ''}, got {value!r}")


def check_fields(record: Any, name: str = "") -> None:
    """Raise ValueError for a field that breaks the rule for its type; types without a rule are not checked.

    Args:
        name: prefix of the fields in messages.
    """
    for field in fields(record):
        if str(field.type).partition(" | ")[0] in RULES:
            check(f"{name}.{field.name}".lstrip("."), str(field.type), getattr(record, field.name))


def check_output(path: Path, suffixes: Collection[str]) -> None:
    """Raise ValueError unless a file of this name can be written; called before long work."""
    if path.suffix not in suffixes:
        raise ValueError(f"the name of a file to write must end in {' or '.join(suffixes)}, got {path}; choose another")
    target = path if path.exists() else path.parent
    if target.is_dir() == path.exists() or not os.access(target, os.W_OK):
        wrong = "which cannot be written" if path.exists() else "whose folder cannot be written or does not exist"
        raise ValueError(f"there must be a place for the file to write, got {path}, {wrong}; choose another")
