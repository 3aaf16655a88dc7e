"""The grid of processes (data-parallel, sequence-parallel) in accelerate's terms, and checks of what runs on it.

The sequence-parallel degree is accelerate's own context-parallel setting: `cp`, the innermost mesh axis. accelerate
refuses that axis without FSDP2, for models with linear attention and on CPUs, since its own context parallelism shards
softmax attention only. Ours has no such limit, so the mesh is installed after the Accelerator is built (except under
FSDP2, which needs it before).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..sequence_parallel import LAYOUTS, SequenceParallelContext
from ..sequence_parallel.collectives import fingerprints

logger = logging.getLogger(__name__)

REFUSED_ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
_FLAG = "ACCELERATE_USE_PARALLELISM_CONFIG"


def resolve_parallelism(given: ParallelismConfig | None, size: int | str, processes: int) -> ParallelismConfig | None:
    """Return the grid of processes (data-parallel, cp), or None if every sequence stays on one process.

    Args:
        given: accelerate's setting, if the caller has one. It takes precedence over `PARALLELISM_CONFIG_CP_SIZE` in the
            environment (set by `accelerate launch --parallelism_config_cp_size`), and this over `size`.
        size: the sequence-parallel degree, or "auto" for all processes.
        processes: number of processes of the launch.

    Raises:
        ValueError: the degree does not divide the processes, or the grid has another axis than data-parallel and cp.
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
                f"sequence parallelism combines with data parallelism only, got {axis}_size = {axis_size}; set it to 1"
            )
    if given.total_size == processes:
        return given
    # Only the degree was given: the rest is data-parallel. accelerate requires it in dp_shard, under DDP too.
    if given.total_size != degree:
        raise ValueError(
            f"the parallel sizes must multiply to the {processes} processes, got dp_replicate "
            f"{given.dp_replicate_size} x dp_shard {given.dp_shard_size} x cp {degree}; leave the dp sizes out"
        )
    return ParallelismConfig(cp_size=degree, dp_shard_size=processes // degree)


def local_tokens(length: int, ranks: int, layout: str) -> int:
    """Return the tokens of a row on each of the ranks that share it, padding included."""
    return LAYOUTS[layout].padded(length, ranks) // ranks if ranks > 1 else length


def describe_grid(processes: int, ranks: int, tokens: int) -> str:
    """Describe the grid for the terminal: the processes that share a sequence, and the tokens on each of them."""
    replicas = processes // ranks
    return f"{replicas} data-parallel x {ranks} sequence-parallel processes, {tokens:,} tokens of every row each"


def check_dtypes(model: nn.Module, mixed_precision: str) -> None:
    """Check that all trained weights have one dtype, as FSDP requires; with mixed precision, accelerate casts them.

    Raises:
        ValueError: trained weights have several dtypes, as in a bfloat16 model with a learned decay.
    """
    dtypes = {str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad}
    if mixed_precision == "no" and len(dtypes) > 1:
        raise ValueError(
            f"FSDP without mixed precision needs weights of one dtype, got {sorted(dtypes)}; load the model with "
            "dtype=torch.float32, and set bf16=True to compute in bfloat16"
        )


@contextlib.contextmanager
def visible_parallelism(
    parallelism: ParallelismConfig, fsdp: object, *, cpu: bool
) -> Iterator[ParallelismConfig | None]:
    """Yield what accelerate may know of the grid while it creates an Accelerator: nothing, except under FSDP2.

    Inside, accelerate reads no parallelism config from the environment.

    Args:
        fsdp: a plugin, or None; `accelerate launch --use_fsdp` counts as well. accelerate ignores both on CPUs.
    """
    flag = os.environ.pop(_FLAG, None)
    uses_fsdp = fsdp is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    try:
        yield parallelism if uses_fsdp and not (cpu or parse_flag_from_env("ACCELERATE_USE_CPU")) else None
    finally:
        if flag is not None:
            os.environ[_FLAG] = flag


def check_engine(accelerator: Accelerator) -> None:
    """Raise ValueError unless the model is wrapped by DDP, FSDP2 or nothing."""
    if (engine := accelerator.state.distributed_type) in REFUSED_ENGINES:
        raise ValueError(
            f"sequence parallelism works with DDP and FSDP2, got {engine.value}; launch with --multi_gpu or with "
            "--use_fsdp --fsdp_version 2"
        )


def install_cp_mesh(accelerator: Accelerator, parallelism: ParallelismConfig) -> ProcessGroup:
    """Give accelerate's shared state the grid, and return the process group of this rank's sequences."""
    check_engine(accelerator)
    state = accelerator.state
    if state.parallelism_config is None:
        state.parallelism_config = parallelism
        state.device_mesh = parallelism.get_device_mesh(accelerator.device.type)
    elif state.parallelism_config.cp_size != parallelism.cp_size:  # accelerate's state is shared by the process
        raise ValueError(
            "all accelerators of a process share one sequence-parallel degree (cp), got "
            f"{parallelism.cp_size} after {state.parallelism_config.cp_size}"
        )
    if accelerator.is_main_process:
        warn_across_nodes(accelerator.num_processes, parallelism.cp_size)
    return state.device_mesh["cp"].get_group()


def keep_precision(accelerator: Accelerator) -> None:
    """Restrict FSDP2's mixed precision to weights and activations.

    accelerate's own policy also sums gradients in 16 bits and rounds the outputs of the model, including the loss.

    Raises:
        ValueError: the caller's own policy rounds the loss.
    """
    plugin: Any = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    policy = getattr(plugin, "mixed_precision_policy", None)
    if policy is None:
        return
    dtype = policy.param_dtype
    if policy == MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, output_dtype=dtype):  # accelerate's
        policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        plugin.mixed_precision_policy = policy
    if policy.output_dtype is not None and policy.output_dtype.itemsize < 4:
        raise ValueError(
            "mixed_precision_policy must leave the loss in float32, got output_dtype="
            f"{policy.output_dtype}; set output_dtype to None or float32"
        )


def warn_across_nodes(processes: int, degree: int) -> None:
    """Warn of sequence-parallel groups that cross nodes, if the launcher sets LOCAL_WORLD_SIZE (torchrun does)."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))  # the ranks of a node are consecutive, as those of a group
    groups = [range(first, first + degree) for first in range(0, processes, degree)]
    across = [group for group in groups if per_node and group[0] // per_node != group[-1] // per_node]
    if across:
        logger.warning(
            "%d of %d sequence-parallel groups cross nodes of %d processes, the first with the ranks %s: softmax "
            "layers then exchange keys and values over the slower links between nodes; where memory allows, choose a "
            "degree that divides %d",
            len(across), len(groups), per_node, list(across[0]), per_node,
        )  # fmt: skip


def set_timeout(accelerator: Accelerator, seconds: float) -> None:
    """Set how long collectives wait for other processes.

    torch gives the groups of a mesh its own default, and TrainingArguments' ddp_timeout reaches no group on CPUs.
    """
    if not dist.is_initialized():
        return
    mesh = accelerator.state.device_mesh
    for group in [dist.group.WORLD, *(mesh.get_all_groups() if mesh is not None else ())]:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)  # torchtitan uses it, too


class PeerCheck:
    """Compare the batches of the ranks of a sequence: batch 1, 2, 4, 8 and so on, since streams may diverge later."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, context: SequenceParallelContext, batch: Mapping[str, Any]) -> None:
        self.batches += 1
        if self.batches & (self.batches - 1) == 0:
            check_peers(context, batch)


def check_peers(context: SequenceParallelContext, batch: Mapping[str, Any]) -> None:
    """Raise ValueError on all ranks unless all ranks of a sequence-parallel group hold the same tokens."""
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if context.group is None or tokens is None:
        return
    hashes = fingerprints(tokens, context.group)
    if len(set(hashes)) > 1:
        raise ValueError(
            f"all ranks of a sequence must load the same batch, got different ones: rank {context.rank} of "
            f"{context.world_size}, hashes of input_ids {[f'{h % 2**64:016x}' for h in hashes]}; for an iterable "
            "dataset set accelerator_config={'dispatch_batches': False}, and seed all samplers alike"
        )
