"""The processes of a launch: how many there are, whether they form one group, and how they end with an error."""

from __future__ import annotations

import os
import time
from typing import NoReturn

import torch
import torch.distributed as dist
from accelerate.utils import get_int_from_env

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Variables in which torchrun, MPI and srun give the number of processes. torchrun may itself run under srun."""
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
TORCH_LAUNCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE = 30.0  # seconds


def launched_processes() -> int:
    """Return the number of processes that were started together: the larger of the number in the environment and the
    size of the process group, if there is one.

    Raises:
        ValueError: WORLD_SIZE without RANK.
    """
    launched = get_int_from_env(SIZES, 1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" not in os.environ:
        raise ValueError(
            f"a launch sets RANK together with WORLD_SIZE, got WORLD_SIZE={launched} without it; unset WORLD_SIZE if "
            "it is left over, or start the processes with torchrun or accelerate launch"
        )
    return max(launched, dist.get_world_size() if dist.is_initialized() else 1)


def check_launch(processes: int) -> None:
    """Check that accelerate has joined all processes of the launch; otherwise each would train by itself.

    Args:
        processes: accelerate's number of processes.

    Raises:
        ValueError: the launch has another number of processes.
    """
    if (launched := launched_processes()) == processes:
        return
    found = ", ".join(f"{name}={os.environ[name]}" for name in SIZES if name in os.environ)
    raise ValueError(
        f"the processes of a launch must form one group, got {launched} ({found or 'in torch.distributed'}) of which "
        f"accelerate has joined {processes}. On CPUs set ACCELERATE_USE_CPU=true, or use_cpu=True in "
        "TrainingArguments, or cpu=True in an Accelerator; on GPUs start them with torchrun or accelerate launch, "
        "which set LOCAL_RANK. For separate runs, or if it is left over, unset "
        f"{found.partition('=')[0] or 'the group'}"
    )


def join_on_cpus() -> None:
    """Ask accelerate to join the processes of a launch on a machine without an accelerator, where it does so only on
    request. Call this before accelerate builds its state."""
    if launched_processes() > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def forget_launch() -> None:
    """Remove the variables that another launch has left behind: accelerate would wait for its processes."""
    for name in TORCH_LAUNCH:
        os.environ.pop(name, None)


def fail(error: Exception) -> NoReturn:
    """End this process with the line `error: ...`.

    An error that all ranks find is printed once: the other ranks give rank 0 time to print it, then the launcher ends
    them.
    """
    if get_int_from_env(RANKS, 0) > 0:
        time.sleep(GRACE)
    raise SystemExit(f"error: {error}") from error
