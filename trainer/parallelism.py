"""How many processes share a sequence, and telling accelerate so.

The degree is accelerate's own context-parallel setting, mesh axis `cp`, the innermost one. accelerate refuses that
axis without FSDP2, for models with linear attention, and on CPUs, because of what its own context parallelism can
do; ours needs none of it. So, except under FSDP2, the axis is attached once the Accelerator is built; and in every
case its hook that would shard softmax attention (`_prepare_cp`) passes everything through.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed import DeviceMesh

from ..sequence_parallel import LAYOUTS, SequenceParallelConfig, SequenceParallelContext
from ..sequence_parallel.collectives import fingerprints

logger = logging.getLogger(__name__)

REFUSED_ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
_FLAG = "ACCELERATE_USE_PARALLELISM_CONFIG"


def resolve_parallelism(given: ParallelismConfig | None, size: int | str, processes: int) -> ParallelismConfig | None:
    """The processes as a grid (data-parallel, cp), or None where every sequence stays on one process.

    Args:
        given: accelerate's setting, if the caller has one; else `PARALLELISM_CONFIG_CP_SIZE` of the environment
            (which `accelerate launch --parallelism_config_cp_size` sets) counts; else `size`.
        size: the sequence-parallel degree, or "auto" for all processes.
        processes: of the whole launch.

    Raises:
        ValueError: a degree that does not divide the processes, or another axis than data-parallel beside cp.
    """
    if given is None and "PARALLELISM_CONFIG_CP_SIZE" in os.environ:
        given = ParallelismConfig()
    if given is None:
        if size != "auto" and (not isinstance(size, int) or size < 1):
            raise ValueError(f"sequence_parallel_size must be 'auto' or a positive integer, got {size!r}")
        given = ParallelismConfig(cp_size=processes if size == "auto" else int(size))
    degree = given.cp_size
    if processes % degree:
        raise ValueError(
            f"the sequence-parallel degree (cp) must divide the number of processes, got {degree} for {processes}; "
            f"launch a multiple of {degree} processes or choose another degree"
        )
    if degree == 1:
        return None
    for axis, axis_size in (("tp", given.tp_size), ("sp", given.sp_size)):
        if axis_size > 1:
            raise ValueError(
                f"sequence parallelism goes with data parallelism only, got {axis}_size = {axis_size}; set it to 1"
            )
    if given.total_size == processes:
        return given
    # Only the degree was said: the rest is data-parallel. accelerate wants that in dp_shard, under DDP too.
    if given.total_size != degree:
        raise ValueError(
            f"the parallel sizes must multiply to the {processes} processes, got dp_replicate "
            f"{given.dp_replicate_size} x dp_shard {given.dp_shard_size} x cp {degree}; leave the dp sizes out"
        )
    return ParallelismConfig(cp_size=degree, dp_shard_size=processes // degree)


def local_tokens(length: int, ranks: int, layout: str) -> int:
    """Of a row, on each of the ranks that share it, padding included."""
    return LAYOUTS[layout].padded(length, ranks) // ranks if ranks > 1 else length


def describe_grid(processes: int, ranks: int, tokens: int) -> str:
    """For the terminal: which processes share a sequence, and how many tokens of it each one has."""
    lines = [
        f"{processes // ranks} data-parallel x {ranks} sequence-parallel processes, {tokens:,} tokens of every row each"
    ]
    for first in range(0, processes, ranks):
        members = f"rank {first}" if ranks == 1 else f"ranks {first} to {first + ranks - 1}"
        lines.append(f"  rows of replica {first // ranks}: {members}")
    return "\n".join(lines)


def uses_fsdp(plugin: object, *, cpu: bool) -> bool:
    """FSDP by a plugin's settings or by `accelerate launch --use_fsdp`; accelerate ignores both on CPUs."""
    return not cpu and (plugin is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true")


@contextlib.contextmanager
def hidden_parallelism() -> Iterator[None]:
    """Keeps accelerate from building a parallelism config of its own while an Accelerator is made."""
    flag = os.environ.pop(_FLAG, None)
    try:
        yield
    finally:
        if flag is not None:
            os.environ[_FLAG] = flag


def attach(
    accelerator: Accelerator, parallelism: ParallelismConfig, config: SequenceParallelConfig
) -> SequenceParallelContext:
    """Gives a built accelerator the grid, and returns this process's sequence-parallel context."""
    state = accelerator.state
    if state.distributed_type in REFUSED_ENGINES:
        raise ValueError(
            f"sequence parallelism goes with DDP and FSDP2, got {state.distributed_type.value}; launch with "
            "--multi_gpu or with --use_fsdp --fsdp_version 2"
        )
    if state.parallelism_config is None:
        state.parallelism_config = parallelism
        state.device_mesh = parallelism.get_device_mesh(accelerator.device.type)
    elif state.parallelism_config.cp_size != parallelism.cp_size:  # accelerate's state is shared by the process
        raise ValueError(
            "all accelerators of a process share one sequence-parallel degree (cp), got "
            f"{parallelism.cp_size} after {state.parallelism_config.cp_size}"
        )
    accelerator._prepare_cp = lambda *objects: objects
    if accelerator.is_main_process:
        warn_across_nodes(sequence_groups(state.device_mesh))
    return SequenceParallelContext(state.device_mesh["cp"].get_group(), config)


def sequence_groups(mesh: DeviceMesh) -> list[list[int]]:
    """The global ranks of every sequence-parallel group."""
    axis = (mesh.mesh_dim_names or ()).index("cp")
    return mesh.mesh.movedim(axis, -1).reshape(-1, mesh.shape[axis]).tolist()


def warn_across_nodes(groups: list[list[int]]) -> None:
    """A warning if a group's exchange leaves a node; known where LOCAL_WORLD_SIZE is, so to torchrun and accelerate."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))  # torchrun numbers the ranks of a node in a row
    across = [group for group in groups if per_node and len({rank // per_node for rank in group}) > 1]
    if across:
        logger.warning(
            "%d of %d sequence-parallel groups cross nodes of %d processes, the first with the ranks %s: softmax "
            "layers then exchange keys and values over the slower links between nodes; where memory allows, choose a "
            "degree that divides %d",
            len(across), len(groups), per_node, across[0], per_node,
        )  # fmt: skip


def set_timeout(accelerator: Accelerator, seconds: float) -> None:
    """How long a collective waits for other processes: torch gives the groups of a mesh its own default, and
    TrainingArguments' ddp_timeout does not reach any group on CPUs."""
    if not dist.is_initialized():
        return
    mesh = accelerator.state.device_mesh
    for group in [dist.group.WORLD, *(mesh.get_all_groups() if mesh is not None else ())]:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)  # what torchtitan uses as well


class PeerCheck:
    """Compares the batches of the ranks of a sequence: the first one of a run and, because streams may part later,
    the second, the fourth, the eighth and so on."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, context: SequenceParallelContext, batch: Mapping[str, Any]) -> None:
        self.batches += 1
        if self.batches & (self.batches - 1) == 0:
            check_peers(context, batch)


def check_peers(context: SequenceParallelContext, batch: Mapping[str, Any]) -> None:
    """ValueError, on all ranks, unless all ranks of a sequence-parallel group hold the same tokens."""
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if context.group is None or tokens is None:
        return
    hashes = fingerprints(tokens, context.group)
    if len(set(hashes)) > 1:
        raise ValueError(
            f"all ranks of a sequence must load the same batch, got others: rank {context.rank} of "
            f"{context.world_size}, hashes of input_ids {[f'{h % 2**64:016x}' for h in hashes]}; for an iterable "
            "dataset set accelerator_config={'dispatch_batches': False}, and seed all samplers alike"
        )


def is_sharded_by(model: nn.Module, context: SequenceParallelContext) -> bool:
    """Whether `context` is enabled on `model`."""
    return any(getattr(module, "sequence_parallel_context", None) is context for module in model.modules())
