"""Launches as torchrun makes them, by its own agent: real processes, signals and exit codes.

Everything is forked from a process that has torch and transformers imported, which spares each process the imports.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.ranks import preloaded_context


@dataclass(frozen=True, slots=True)
class Ended:
    """A launch that has ended: its exit code, what torchrun said, and what every rank wrote to stderr."""

    exit_code: int
    summary: str
    errors: list[str]


def launch(
    function: Callable[..., Any],
    processes: int,
    *args: Any,
    folder: Path,
    interrupt: Callable[[], bool] | None = None,
    restarts: int = 0,
    timeout: float = 240.0,  # enough on a busy machine
) -> Ended:
    """`torchrun --nproc_per_node processes` of `function(*args)`.

    Args:
        folder: for what the processes write.
        interrupt: asked every now and then; once it is true, the launcher gets a SIGTERM, as from a scheduler.
        restarts: torchrun's --max-restarts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = preloaded_context().Process(target=_torchrun, args=(function, processes, args, str(folder), restarts))
    process.start()
    deadline = time.monotonic() + timeout
    while process.is_alive() and time.monotonic() < deadline:
        process.join(0.05)
        if interrupt is not None and interrupt():
            os.kill(process.pid or 0, signal.SIGTERM)
            interrupt = None
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"a launch took more than {timeout} s; what it wrote is in {folder}")
    logs = [sorted(folder.rglob(f"{rank}/stderr.log")) for rank in range(processes)]  # of every attempt
    errors = ["".join(log.read_text() for log in attempts) for attempts in logs]
    return Ended(process.exitcode or 0, (folder / "summary").read_text(), errors)


def _torchrun(function: Callable[..., Any], processes: int, args: tuple[Any, ...], folder: str, restarts: int) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with (Path(folder) / "summary").open("w") as summary:
        os.dup2(summary.fileno(), sys.stderr.fileno())
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if restarts:  # else torch 2.13 meets again at the addresses of ranks that died
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=Std.ALL),
    )
    elastic_launch(config, _script)(function, args)


def _script(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Run a function like a script: its traceback goes to stderr, where the launcher would write a file."""
    try:
        function(*args)
    except Exception:
        traceback.print_exc()
        raise
