"""Marks for tests that need a particular machine."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import pytest

needs_cxx = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")), reason="inductor compiles C++ on a CPU"
)


def slow_unless(fast: Callable[..., bool], **values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test over the product of `values`; combinations that are not `fast` are marked slow.

    Ids are made of all values, as in `W3-channel-lasp2-zigzag`.
    """
    parameters = [
        pytest.param(
            *combination,
            marks=() if fast(**dict(zip(values, combination, strict=True))) else pytest.mark.slow,
            id="-".join(_id(name, value) for name, value in zip(values, combination, strict=True)),
        )
        for combination in itertools.product(*values.values())
    ]
    return pytest.mark.parametrize(list(values), parameters)


def _id(name: str, value: object) -> str:
    prefix = {"world_size": "W", "ranks": "W", "groups": "G", "tokens": "T"}.get(name, "")
    return f"{prefix}{value}".removeprefix("torch.")


each_attention_implementation = pytest.mark.parametrize(
    ("implementation", "stance"),
    [
        ("eager", "default"),
        ("flex_attention", "force_eager"),
        pytest.param("flex_attention", "default", marks=[needs_cxx, pytest.mark.slow]),
    ],
    ids=["eager", "flex-uncompiled", "flex-compiled"],
)
