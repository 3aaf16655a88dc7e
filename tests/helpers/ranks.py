"""A shared pool of gloo workers per world size: starting ranks is slow, so a test session starts each pool once.

results = run_distributed(function, world_size, *args)      # function is module-level; one result per rank
"""

from __future__ import annotations

import atexit
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT = 180.0  # seconds for one call
_pools: dict[int, _Pool] = {}


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls `function(*args)` on `world_size` ranks with an initialized gloo group; returns every rank's result.

    A failing or hanging rank ends the pool (the next call starts another) and raises with its traceback.
    """
    if world_size not in _pools:
        _pools[world_size] = _Pool(world_size)
    return _pools[world_size].call(function, args)


def strided_group() -> Any:
    """Make the groups (0, 2) and (1, 3) of four ranks; return the one that this rank belongs to."""
    import torch.distributed as dist

    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return groups[dist.get_rank() % 2]


def preloaded_context() -> Any:
    """Makes processes that have torch imported already, forks of one that does nothing else."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "linear_llama3.trainer", "datasets"])
    return context


class _Pool:
    def __init__(self, world_size: int) -> None:
        context = preloaded_context()
        self.world_size, self.pipes, self.processes = world_size, [], []
        port = _free_port()
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, rank, world_size, port), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + TIMEOUT
        while len(results) + len(failures) < self.world_size and time.monotonic() < deadline:
            for rank, pipe in enumerate(self.pipes):
                if rank in results or rank in failures or not pipe.poll(0.001):
                    continue
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "the process died"
                (results if ok else failures)[rank] = value
                if not ok:  # the others may wait for this rank forever
                    deadline = min(deadline, time.monotonic() + 2.0)
        if len(results) < self.world_size:
            self.kill()
            silent = sorted(set(range(self.world_size)) - set(results) - set(failures))
            text = "\n".join(f"rank {rank}: {failure}" for rank, failure in failures.items())
            raise RuntimeError(f"{text}\nranks without an answer: {silent}")
        return [results[rank] for rank in range(self.world_size)]

    def kill(self) -> None:
        _pools.pop(self.world_size, None)
        for process in self.processes:
            process.kill()


def _worker(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
        OMP_NUM_THREADS="1",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@atexit.register
def _kill_all() -> None:
    for pool in list(_pools.values()):
        pool.kill()  # not a clean exit on purpose: gloo aborts now and then at interpreter exit
