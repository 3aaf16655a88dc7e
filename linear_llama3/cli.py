"""The command line: linear-llama3 train RECIPE.yaml [section.key=value …], and commands that use a model."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import torch
import typer

from . import __version__
from .commands.evaluation import check_evaluation, evaluate
from .commands.generation import chat, generate
from .commands.needle import check_needle, needle
from .commands.serving import serve
from .sequence_parallel.planner.checks import check_output
from .sequence_parallel.planner.profile import SUFFIXES
from .sequence_parallel.planner.report import report
from .trainer.command_line import Changes, RecipeFile, user_errors
from .trainer.launched import forget_launch, launched_processes

if TYPE_CHECKING:
    from .trainer.recipes.recipe import Recipe

TRAINER, PROFILER = "linear_llama3.trainer", "linear_llama3.trainer.adaptive.profiling"
EVALUATION, NEEDLE = "linear_llama3.commands.evaluation", "linear_llama3.commands.needle"
SHUTDOWN_SECONDS = 300  # for a checkpoint after SIGTERM; torch would kill the processes after 30 s

Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Number of processes that share every row. Default: one per GPU, or one on a CPU."),
]

app = typer.Typer(
    help="Train Llama-3-class models with linear attention on sequences sharded over several devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("plan")(report)


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
    if not dry_run:
        start(TRAINER, recipe, [str(recipe), *(changes or [])], changes)
    with user_errors():
        from .trainer.recipes.dry_run import dry_run as described
        from .trainer.recipes.recipe import load_recipe

        loaded = load_recipe(recipe, changes or [])
        gpu, processes = number_of_processes(loaded, planned=True)
        print(described(loaded, processes, gpu=gpu))


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
        check_output(output, SUFFIXES)
    start(PROFILER, recipe, [str(recipe), str(output), *(changes or [])], changes)


@app.command()
def presets(
    names: Annotated[list[str] | None, typer.Argument(metavar="PRESET", help="Names of presets. Default: all.")] = None,
) -> None:
    """List named models with their layers, parameters and sizes of states."""
    from .commands.presets import list_presets, table

    with user_errors():
        print(table(names or list_presets()))


def on_processes(module: str, command: Callable[..., None], check: Callable[..., None]) -> Callable[..., None]:
    """Return a command with an additional option `--processes`, which runs its module on several processes.

    Args:
        module: the module that runs `command` in each process.
        check: is called with the command's arguments before the processes start, and raises ValueError for invalid
            ones.
    """

    @functools.wraps(command)
    def run(*, processes: int | None, **arguments: Any) -> None:
        with user_errors():
            launched = launched_processes() > 1
        if not launched:
            forget_launch()
            with user_errors():
                gpu, count = place(processes or "auto")
                check(**arguments)
            if not gpu:
                os.environ["ACCELERATE_USE_CPU"] = "true"
            if count > 1:
                launch(module, command_line(command, arguments), count, gpu=gpu)
        command(**arguments)

    signature = inspect.signature(command, eval_str=True)
    own = inspect.Parameter("processes", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Processes)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])  # type: ignore[attr-defined]
    return run


def command_line(command: Callable[..., None], arguments: dict[str, Any]) -> list[str]:
    """Return command-line arguments for a module that make it call its command with these arguments."""
    options, positional = [], []
    for name, parameter in inspect.signature(command).parameters.items():
        given, flag = arguments[name], f"--{name.replace('_', '-')}"
        for value in given if isinstance(given, list) else [given]:
            if parameter.default is inspect.Parameter.empty:
                positional.append(str(value))
            elif value is True:
                options.append(flag)
            elif value is not None and value is not False:
                options += [flag, str(value)]
    return [*options, "--", *positional]


def start(module: str, recipe: Path, arguments: list[str], changes: list[str] | None) -> NoReturn:
    """Run `module` with these arguments on the recipe's number of processes; does not return."""
    from .trainer.recipes.preflight import NothingLeft, check_before_launch
    from .trainer.recipes.recipe import load_recipe

    with user_errors():
        if launched_processes() > 1:  # torchrun, accelerate or MPI has started several processes
            exec_module(module, arguments)
        forget_launch()
        loaded = load_recipe(recipe, changes or [])
        gpu, processes = number_of_processes(loaded)
        if module == TRAINER:
            try:
                check_before_launch(loaded, processes)
            except NothingLeft as finished:
                print(finished)
                raise SystemExit(0) from None
    if not gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if processes > 1:
        launch(module, arguments, processes, gpu=gpu)
    if gpu:  # with several visible GPUs, Trainer would use DataParallel
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    exec_module(module, arguments)


def number_of_processes(recipe: Recipe, *, planned: bool = False) -> tuple[bool, int]:
    """Return whether a recipe runs on GPUs, and the number of its processes.

    Args:
        planned: assume a machine with a GPU for each process of the recipe.
    """
    return place(recipe.processes, cpu=recipe.training.get("use_cpu", False), planned=planned)


def place(processes: int | str, *, cpu: bool = False, planned: bool = False) -> tuple[bool, int]:
    """Return whether to run on GPUs, and the number of processes; "auto" is one per GPU, or one on a CPU."""
    devices = torch.accelerator.device_count()
    gpu = not cpu and (devices > 0 or planned)
    if processes == "auto":
        return gpu, max(devices, 1) if gpu else 1
    processes = int(processes)
    if gpu and not planned and processes > devices:
        raise ValueError(
            f"every process needs its own GPU, got processes: {processes} and {devices} visible GPUs; set "
            "processes: auto or training.use_cpu: true"
        )
    return gpu, processes


def launch(module: str, arguments: list[str], processes: int, *, gpu: bool) -> NoReturn:
    """Run `accelerate launch` on this machine; does not return.

    All processes receive SIGTERM and Ctrl-C. The exit code is that of the first process that fails.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // processes)))
    flags = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(processes), "--main_process_port", "0"]
    flags += ["--mixed_precision", "no", "--dynamo_backend", "no", "--gpu_ids", "all"]  # the Trainer sets the recipe's
    flags += [] if gpu else ["--num_cpu_threads_per_process", str(threads)]
    parsed = launch_command_parser().parse_args([*flags, "--module", module, *arguments])
    parsed.shutdown_timeout = SHUTDOWN_SECONDS
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode  # a negative one is a signal's
        print(f"error: process {rank} of {processes} {_how_it_ended(failure.exitcode)}", file=sys.stderr)
        raise SystemExit(code) from None
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
    raise SystemExit(0)


def _how_it_ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}; its message is above"
    if exit_code == -signal.SIGKILL:  # a killed process cannot print a message
        return (
            "was killed (signal 9), probably because the machine ran out of memory; `linear-llama3 train RECIPE.yaml "
            "--dry-run` computes the memory that a process needs"
        )
    return f"was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})"


def exec_module(module: str, arguments: list[str]) -> NoReturn:
    """Replace this process by `python -m module`."""
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


for _name, _command in (
    ("evaluate", on_processes(EVALUATION, evaluate, check_evaluation)),
    ("needle", on_processes(NEEDLE, needle, check_needle)),
    ("generate", generate),
    ("chat", chat),
    ("serve", serve),
):
    app.command(_name, no_args_is_help=True)(_command)

if __name__ == "__main__":
    app()
