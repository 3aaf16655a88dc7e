"""Parts of the command lines: arguments that commands share, errors of users in one line, and the end of a process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer

from .launched import fail

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe, see trainer/recipes/recipe.py.")]
Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that replace those of the recipe: training.max_steps=10"),
]


@contextlib.contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = (ValueError, ImportError)) -> Iterator[None]:
    """Turn a user's mistake into one line `error: ...` with exit code 1."""
    try:
        yield
    except kinds as error:
        fail(error)


def run(command: Callable[..., None]) -> None:
    """Run `command` with the command-line arguments of this process, then leave the process group."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app()
    except SystemExit as end:
        if end.code:
            raise
    leave()


def leave() -> None:
    """End a process of several: after an orderly goodbye, gloo may still abort at interpreter exit."""
    if not dist.is_initialized():
        return
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
