"""Run a command of `linear-llama3` on several processes of this machine: the same command line, under a launcher."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, NoReturn

import torch
import typer

from ..trainer.launched import forget_launch

CLI = "linear_llama3.cli"
SHUTDOWN_SECONDS = 300  # for a checkpoint after SIGTERM; torch would kill the processes after 30 s

Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Number of processes that share every row. Default: one per GPU, or one on a CPU."),
]


def place(processes: int | str | None, *, cpu: bool = False, planned: bool = False) -> tuple[bool, int]:
    """Return whether to run on GPUs, and the number of processes; "auto" and None are one per GPU, or one on a CPU.

    Args:
        planned: assume a machine with a GPU for each process.
    """
    devices = torch.accelerator.device_count()
    gpu = not cpu and (devices > 0 or planned)
    if processes in ("auto", None):
        return gpu, max(devices, 1) if gpu else 1
    if gpu and not planned and int(processes) > devices:
        raise ValueError(
            f"every process needs its own GPU, got processes: {processes} and {devices} visible GPUs; set "
            "processes: auto or training.use_cpu: true"
        )
    return gpu, int(processes)


def start(gpu: bool, processes: int) -> None:
    """Continue as the only process, or start several with this command line, wait, and exit with their code."""
    forget_launch()
    if not gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if processes > 1:
        launch(processes, gpu=gpu)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if gpu and os.environ.get("CUDA_VISIBLE_DEVICES") != visible:  # with several GPUs, Trainer would use DataParallel
        os.environ["CUDA_VISIBLE_DEVICES"] = visible  # read once by CUDA
        os.execv(sys.executable, [sys.executable, "-m", CLI, *sys.argv[1:]])


def launch(processes: int, *, gpu: bool) -> NoReturn:
    """Run this command line under `accelerate launch` on this machine, and exit.

    All processes receive SIGTERM and Ctrl-C. The exit code is that of the first process that fails.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // processes)))
    flags = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(processes), "--main_process_port", "0"]
    flags += ["--mixed_precision", "no", "--dynamo_backend", "no", "--gpu_ids", "all"]  # the Trainer sets the recipe's
    flags += [] if gpu else ["--num_cpu_threads_per_process", str(threads)]
    parsed = launch_command_parser().parse_args([*flags, "--module", CLI, *sys.argv[1:]])
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
