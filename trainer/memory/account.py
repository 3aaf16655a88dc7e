"""Memory that a device needs to train a model, computed without running it.

The model's own code runs a micro-batch, forward and backward, on fake tensors (`tracker.py`), with its checkpoints,
tiles and communication. Weights, gradients and optimizer states are added.

    print(memory_account(config, tokens=131072, dtype=torch.bfloat16, checkpointing=True, tiling=True).table())
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...modeling import LinearLlama3Config, LinearLlama3ForCausalLM, enable_sequence_tiling
from ...sequence_parallel import SequenceParallelConfig, SequenceParallelContext, enable_sequence_parallel
from .tracker import FakeMemoryTracker, as_on_a_gpu

LAYERS, HEAD = "inside layers", "head and loss"
OPTIMIZERS: dict[str, Callable[[int], int]] = {  # bytes of a parameter -> bytes of its states
    "adamw": lambda size: 2 * size,
    "adamw_8bit": lambda size: 2,
    "sgd": lambda size: 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAccount:
    """Bytes on a device at the peak of a step.

    - `lines`: "weights", "gradients", "optimizer"; "layer inputs" (kept by checkpointing), "inside layers", "head and
      loss", "states exchanged" (by sequence parallelism, with the keys and values of softmax layers); "communication"
      (gradients and weights of DDP or FSDP2).
    - `exchanged`: the most bytes exchanged at any moment, not necessarily at the peak.
    - `host`: bytes of offloaded layer inputs in the host's memory.
    """

    lines: dict[str, int]
    exchanged: int
    host: int

    @property
    def total(self) -> int:
        return sum(self.lines.values())

    def table(self) -> str:
        rows = [(name, size, f" {size / self.total:>6.1%}") for name, size in self.lines.items() if size]
        rows += [("total", self.total, "")] + ([("in host memory", self.host, "")] if self.host else [])
        return "\n".join(f"{name:<18}{size / 2**30:>9.2f} GiB{share}" for name, size, share in rows)


def memory_account(
    model: LinearLlama3Config | nn.Module,
    *,
    tokens: int,
    rows: int = 1,
    documents: int = 1,
    ranks: int = 1,
    strategies: SequenceParallelConfig | None = None,
    replicas: int = 1,
    fsdp: bool = False,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    offload: bool = False,
    tiling: bool = False,
    chunked_loss: bool = True,
    gpu: bool = True,
) -> MemoryAccount:
    """Compute the memory account of a causal language model.

    The micro-batch has a label for every token and is not the first of its step: all gradients exist. The allocator's
    overhead, the CUDA context, NCCL's buffers (1 to 3 GB in total, as a rule) and the temporaries of an optimizer that
    is not fused come on top.

    Args:
        model: a config, or a model, of which only shapes are read: `torch.device("meta")` is enough. With adapters
            (PEFT), only parameters that require a gradient are trained.
        tokens: T, tokens of a full sequence.
        rows: rows in a device's micro-batch.
        documents: documents packed in each row.
        ranks: W, devices that share every sequence. The account is that of the last rank.
        strategies: strategies of these ranks; default LASP-2 and LASP-2H.
        replicas: number of such groups of devices.
        fsdp: True shards weights, gradients and optimizer states over all devices (FSDP2); False keeps them on each
            device (DDP).
        dtype: dtype of the weights, for a config.
        autocast: dtype of autocast (`bf16=True` of TrainingArguments), or None.
        optimizer: "adamw" (two states in the dtype of the weights), "adamw_8bit" or "sgd" (without momentum).
        checkpointing: `activation_checkpointing` of TrainingArguments.
        offload: `activation_checkpointing_kwargs={"offload": True}`.
        tiling: `sequence_tiling`.
        chunked_loss: True computes the loss without logits, False with the model's logits.
        gpu: True assumes the kernels for NVIDIA GPUs, False a CPU.

    Raises:
        ValueError: an unknown optimizer; offload without checkpointing; several ranks in a process that is itself
            in a process group; a GPU's account without the package triton.
    """
    _check(optimizer, checkpointing=checkpointing, offload=offload, ranks=ranks)
    if isinstance(model, LinearLlama3Config):
        with torch.device("meta"):
            model = LinearLlama3ForCausalLM(model).to(dtype)
    run = FakeMemoryTracker(LAYERS)
    fake = _with_fake_parameters(model, run)
    _prepare(fake, run, checkpointing=checkpointing, offload=offload, tiling=tiling)
    with contextlib.ExitStack() as stack:
        context = None
        if ranks > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

            dist.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
            stack.callback(dist.destroy_process_group)
            context = SequenceParallelContext(dist.group.WORLD, strategies or SequenceParallelConfig())
            enable_sequence_parallel(fake, context)
        if gpu:
            stack.enter_context(as_on_a_gpu())
        stack.enter_context(run)
        batch = _batch(tokens, rows, documents, context)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = fake(**batch, num_items_in_batch=tokens * rows, skip_logits=chunked_loss).loss
        loss.backward()
    held = _held(fake, optimizer, devices=ranks * replicas, fsdp=fsdp)
    lines = {**held, **{name: size for name, size in run.peak.items() if name}}
    return MemoryAccount(lines=lines, exchanged=run.exchanged, host=run.host)


def _check(optimizer: str, *, checkpointing: bool, offload: bool, ranks: int) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {sorted(OPTIMIZERS)}, got {optimizer!r}")
    if offload and not checkpointing:
        raise ValueError("offload=True moves what checkpointing keeps, got checkpointing=False; set it to True")
    if ranks > 1 and dist.is_initialized():
        raise ValueError(
            f"an account of {ranks} ranks needs a process without a process group, got one in a group; compute it "
            "before torch.distributed is initialized"
        )


def _with_fake_parameters(model: Any, run: FakeMemoryTracker) -> Any:
    """Return a copy of the model (without PEFT's wrapper) with fake parameters."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    memo: dict[int, Any] = {id(x): run.parameter(x) for x in model.parameters()}
    memo |= {id(x): nn.Buffer(torch.zeros_like(x, device="cpu"), persistent=False) for x in model.buffers()}
    return copy.deepcopy(model, memo).train()


def _prepare(model: Any, run: FakeMemoryTracker, *, checkpointing: bool, offload: bool, tiling: bool) -> None:
    """Switch on tiling, checkpointing and offloading, and set the tracker's stages by hooks."""
    enable_sequence_tiling(model, tiling)
    if checkpointing:  # the older name is that of transformers before 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    decoder = model.get_decoder()
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda layer, args: run.move(args[0], "layer inputs"))
        if offload:
            layer._gradient_checkpointing_func = run.offloading(layer._gradient_checkpointing_func)

    def loss_begins(module: nn.Module, args: Any, output: Any) -> None:
        run.stage = HEAD
        if output.last_hidden_state.requires_grad:  # not if the head alone is trained
            output.last_hidden_state.register_hook(lambda gradient: setattr(run, "stage", LAYERS))

    decoder.register_forward_hook(loss_begins)


def _batch(tokens: int, rows: int, documents: int, context: SequenceParallelContext | None) -> dict[str, Any]:
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if documents > 1:
        n = rows * documents
        batch["cu_seq_lens_q"] = torch.tensor([i * rows * tokens // n for i in range(n + 1)], dtype=torch.int32)
    return batch if context is None else context.shard_batch(batch)


def _held(model: Any, optimizer: str, *, devices: int, fsdp: bool) -> dict[str, int]:
    """Return the bytes that are alive during the complete step."""
    weights = sum(x.nbytes for x in model.parameters())
    trained = [x for x in model.parameters() if x.requires_grad]
    gradients = sum(x.nbytes for x in trained)
    states = sum(x.numel() * OPTIMIZERS[optimizer](x.itemsize) for x in trained)
    shards, communication = devices if fsdp else 1, 0
    if shards > 1:  # the layer in use and the next one, with gradients before and after their reduction
        largest = max(sum(x.nbytes for x in layer.parameters()) for layer in model.get_decoder().layers)
        communication = 4 * largest + 2 * model.get_input_embeddings().weight.nbytes
    elif devices > 1:  # DDP's buckets
        communication = gradients
    held = {"weights": weights, "gradients": gradients, "optimizer": states}
    return {name: math.ceil(size / shards) for name, size in held.items()} | {"communication": communication}
