"""The command line: linear-llama3 train RECIPE.yaml [section.key=value …], and commands that use a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import __version__
from .commands.evaluation import evaluate
from .commands.generation import chat, generate
from .commands.launching import place, start
from .commands.needle import needle
from .commands.serving import serve
from .sequence_parallel.planner.checks import check_output
from .sequence_parallel.planner.profile import SUFFIXES
from .sequence_parallel.planner.report import report
from .trainer.command_line import Changes, RecipeFile, leave, user_errors
from .trainer.launched import launched_processes

if TYPE_CHECKING:
    from .trainer.recipes.recipe import Recipe

app = typer.Typer(
    help="Train Llama-3-class models with linear attention on sequences sharded over several devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    result_callback=lambda *_, **__: leave(),
)


def print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        others = ", ".join(f"{name} {version(name)}" for name in ("transformers", "accelerate", "torch"))
        print(f"linear-llama3 {__version__} ({others})")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Handle the options of `linear-llama3` itself."""


@app.command(no_args_is_help=True)
def train(
    recipe: RecipeFile,
    changes: Changes = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, memory, grid and strategies without training. Needs no GPU.")
    ] = False,
) -> None:
    """Train a recipe, on all visible GPUs or on the recipe's number of processes."""
    with user_errors():
        from .trainer.recipes.preflight import check_before_launch
        from .trainer.recipes.recipe import load_recipe

        if dry_run:
            from .trainer.recipes.dry_run import dry_run as described

            loaded = load_recipe(recipe, changes)
            gpu, processes = place_recipe(loaded, planned=True)
            print(described(loaded, processes, gpu=gpu))
            return
        if launched_processes() == 1:
            loaded = load_recipe(recipe, changes)
            gpu, processes = place_recipe(loaded)
            if (finished := check_before_launch(loaded, processes)) is not None:
                print(finished)
                return
            start(gpu, processes)
    from .trainer.__main__ import main

    main(recipe, changes)


@app.command(no_args_is_help=True)
def profile(
    recipe: RecipeFile,
    output: Annotated[
        Path, typer.Argument(metavar="FILE.json", help="The profile for `plan` and for recipes with size: adaptive.")
    ],
    changes: Changes = None,
) -> None:
    """Measure the costs of a recipe's layers and collectives on this machine, on the processes it trains on."""
    with user_errors():
        from .trainer.recipes.recipe import load_recipe

        check_output(output, SUFFIXES)
        if launched_processes() == 1:
            start(*place_recipe(load_recipe(recipe, changes)))
    from .trainer.adaptive.profiling import main

    main(recipe, output, changes)


def place_recipe(recipe: Recipe, *, planned: bool = False) -> tuple[bool, int]:
    """Return whether a recipe runs on GPUs, and the number of its processes."""
    return place(recipe.processes, cpu=recipe.setting("use_cpu"), planned=planned)


@app.command()
def presets(
    names: Annotated[list[str] | None, typer.Argument(metavar="PRESET", help="Names of presets. Default: all.")] = None,
) -> None:
    """List named models with their layers, parameters and sizes of states."""
    from .commands.presets import list_presets, table

    with user_errors():
        print(table(names or list_presets()))


app.command("plan")(report)
for _command in (evaluate, needle, generate, chat, serve):
    app.command(no_args_is_help=True)(_command)

if __name__ == "__main__":
    app()
