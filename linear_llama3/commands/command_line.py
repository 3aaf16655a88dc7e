"""Helpers of commands that also run as modules, such as `python -m linear_llama3.commands.evaluation`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import typer

from ..trainer.launched import fail


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError (a user's mistake) or an ImportError into one line `error: ...` with exit code 1."""
    try:
        yield
    except (ValueError, ImportError) as error:
        fail(error)


def run(command: Callable[..., None]) -> None:
    """Run `command` with the command-line arguments of this process, then leave the process group."""
    from ..trainer.__main__ import leave

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app()
    except SystemExit as end:
        if end.code:
            raise
    leave()
