"""How many processes share a sequence, and telling accelerate so.

The degree is accelerate's own context-parallel setting, mesh axis `cp`, the innermost one. accelerate refuses that
axis without FSDP2, for models with linear attention, and on CPUs, because of what its own context parallelism can
do; ours needs none of it. So, except under FSDP2, the axis is attached once the Accelerator is built; and in every
case its hook that would shard softmax attention (`_prepare_cp`) passes everything through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..sequence_parallel import LAYOUTS, SequenceParallelConfig, SequenceParallelContext
from ..sequence_parallel.collectives import fingerprints
from .rows import gather_rows

logger = logging.getLogger(__name__)

REFUSED_ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
READ_SHARDS = ("compute_loss", "_prepare_inputs")  # Trainer's methods that receive one rank's part of a batch
RIGHT_FOR_SHARDS = (__package__, "transformers.trainer", "trl.trainer.sft_trainer")  # modules; else `handles_shards`
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
    accelerator.gather_for_metrics = partial(gather_rows, accelerator, parallelism.cp_size)
    if accelerator.is_main_process:
        warn_across_nodes(sequence_groups(state.device_mesh))
    return SequenceParallelContext(state.device_mesh["cp"].get_group(), config)


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


def check_overrides(trainer: type) -> None:
    """Raise ValueError if a class overrides a method that receives a part of a batch, without setting `handles_shards`.

    In a part, logits end at the cut, labels lack their neighbours, and the mean over a part is not the mean.
    """
    for owner in trainer.__mro__:
        methods = [name for name in READ_SHARDS if name in vars(owner)]
        known = any(owner.__module__ == name or owner.__module__.startswith(f"{name}.") for name in RIGHT_FOR_SHARDS)
        if methods and not known and not vars(owner).get("handles_shards", False):
            raise ValueError(
                f"under sequence parallelism {' and '.join(methods)} must know that a rank holds a part of every "
                f"sequence, got {owner.__name__}'s own; set model.loss_function instead (called with shift_labels and "
                "num_items_in_batch; needs chunked_loss=False), or set handles_shards = True in that class if it is "
                "correct for a part, for example if it returns what super() returns, or train with "
                "sequence_parallel_size=1"
            )


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
