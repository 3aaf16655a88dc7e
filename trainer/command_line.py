"""What commands share that are also modules, such as `python -m linear_llama3.trainer.evaluation`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import typer

from .launched import fail


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """One line `error: ...` and exit code 1 for a mistake of the user's, a ValueError, or a missing package."""
    try:
        yield
    except (ValueError, ImportError) as error:
        fail(error)


def run(command: Callable[..., None]) -> None:
    """`command` with the arguments of this process; then the end of one process of several."""
    from .__main__ import leave

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app()
    except SystemExit as end:
        if end.code:
            raise
    leave()
