"""Dry run of a recipe, without data, processes or a GPU: `linear-llama3 train RECIPE.yaml --dry-run`."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...modeling import MIXERS, LinearLlama3Config
from ...modeling.flops import attention_pairs, count_flops
from ...sequence_parallel import LAYOUTS, SequenceParallelContext
from ...sequence_parallel.costs import Sizes, choose_linear, choose_softmax, linear_costs, softmax_costs
from ..memory.account import memory_account
from ..parallelism import describe_grid, local_tokens, resolve_parallelism
from .build import build_model, load_tokenizer
from .recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """A recipe on a number of processes of one machine."""

    recipe: Recipe
    model: PreTrainedModel  # on the meta device; PEFT's wrapper if there are adapters
    processes: int
    ranks: int  # W, processes that share every sequence
    layout: str
    gpu: bool

    @property
    def config(self) -> LinearLlama3Config:
        return self.model.config

    @property
    def replicas(self) -> int:
        return self.processes // self.ranks

    @property
    def rows(self) -> int:
        """Rows in the batch of a replica."""
        return self.recipe.setting("per_device_train_batch_size")

    @property
    def local_tokens(self) -> int:
        return local_tokens(self.recipe.sequence_length, self.ranks, self.layout)

    @property
    def recomputes(self) -> bool:
        """True if layers are recomputed in the backward pass; transformers before 5.23 knows only the older name."""
        return any(self.recipe.training.get(f"{name}_checkpointing") for name in ("gradient", "activation"))

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of mixed precision."""
        return torch.bfloat16 if self.recipe.setting("bf16") else torch.float16 if self.recipe.setting("fp16") else None

    def sizes(self, kind: str) -> Sizes:
        """Return the sizes of a linear or softmax layer for the strategies' cost model."""
        config = self.config
        packed = self.recipe.data.packing != "none"  # then rows are concatenated
        assert config.num_key_value_heads is not None and config.head_dim is not None
        heads, key_dim, value_dim, decays = config.num_key_value_heads, config.head_dim, config.head_dim, False
        if kind == "linear":
            heads, key_dim, value_dim = config.linear_state_shape
            mixer = MIXERS[config.linear_attention_type]
            decays = packed or mixer.learned_decay or mixer.constant_log_decay is not None
        return Sizes(
            batch=1 if packed else self.rows,
            tokens=self.local_tokens * (self.rows if packed else 1),
            q_heads=config.num_attention_heads,
            kv_heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            element=(self.autocast or self.model.dtype).itemsize,
            ranks=self.ranks,
            chunks_per_rank=LAYOUTS[self.layout].chunks_per_rank,
            decays=decays,
            recomputed=self.recomputes,
            gpu=self.gpu,
        )


def dry_run(recipe: Recipe, processes: int, *, gpu: bool) -> str:
    """Describe model, step, grid, strategies and memory in lines for the terminal.

    Raises:
        ValueError: no run could start with this recipe and number of processes.
    """
    if recipe.sequence_parallel.size == "adaptive":
        raise ValueError(
            "a dry run describes one degree, got size: adaptive; `linear-llama3 plan --profile` predicts adaptive "
            "groups from the lengths of documents"
        )
    grid = resolve_parallelism(None, recipe.sequence_parallel.size, processes)
    with torch.device("meta"):
        model = build_model(recipe, load_tokenizer(recipe), weights=False)
    context = SequenceParallelContext(None, recipe.sequence_parallel.config())
    context.resolve_layout(model)
    ranks = 1 if grid is None else grid.cp_size
    run = DryRun(recipe=recipe, model=model, processes=processes, ranks=ranks, layout=context.layout, gpu=gpu)
    return "\n".join([*_step(run), *_exchange(run), *_memory(run)])


def _step(run: DryRun) -> list[str]:
    """Describe the model, a step of it, and the grid of processes."""
    length, accumulation = run.recipe.sequence_length, run.recipe.setting("gradient_accumulation_steps")
    total, trained = run.model.num_parameters(), run.model.num_parameters(only_trainable=True)
    share = f", {trained:,} of them trained" if trained < total else ""
    rows = run.replicas * accumulation * run.rows
    flops = count_flops(run.model, rows * length, attention_pairs([length] * rows)).training
    return [
        f"model       {total:,} parameters{share}; layers {run.config.layer_pattern} "
        f"(L {run.config.linear_attention_type}, N softmax)",
        f"step        {rows * length:,} tokens: {run.replicas} replicas x {accumulation} accumulated batches x "
        f"{run.rows} rows x {length:,}",
        f"grid        {'GPUs' if run.gpu else 'CPU'}: {describe_grid(run.processes, run.ranks, run.local_tokens)}",
        f"FLOPs       {flops:.4g} a step, {flops / run.processes:.4g} on each device (softmax layers: for rows of one "
        "document)",
    ]


def _memory(run: DryRun) -> list[str]:
    """Describe the memory of a device at the peak of a step."""
    optimizer = str(run.recipe.setting("optim"))
    known = "sgd" if optimizer == "sgd" else "adamw_8bit" if "8bit" in optimizer else "adamw"
    kwargs = run.recipe.training.get("activation_checkpointing_kwargs") or {}
    with_kernels = importlib.util.find_spec("triton") is not None
    account = memory_account(
        run.model,
        tokens=run.recipe.sequence_length,
        rows=run.rows,
        documents=1 if run.recipe.data.packing == "none" else 2,
        ranks=run.ranks,
        strategies=run.recipe.sequence_parallel.config(),
        replicas=run.replicas,
        fsdp=bool(run.recipe.setting("fsdp")) or os.environ.get("ACCELERATE_USE_FSDP") == "true",
        autocast=run.autocast,
        optimizer=known,
        checkpointing=run.recomputes,
        offload=bool(kwargs.get("offload")),
        tiling=run.recipe.setting("sequence_tiling"),
        chunked_loss=run.recipe.setting("chunked_loss") and not run.recipe.setting("label_smoothing_factor"),
        gpu=run.gpu and with_kernels,
    )
    assumed = "" if optimizer.startswith(known) else f", {optimizer} counted as {known}"
    assumed += "" if with_kernels or not run.gpu else ", without the GPU's kernels, as triton is not installed"
    lines = [
        f"memory      of a device at its peak, computed{assumed}; allocator, CUDA and NCCL come on top (1 to 3 GB):"
    ]
    lines += [f"  {line}" for line in account.table().splitlines()]
    return [*lines, f"  at most {account.exchanged / 2**20:,.1f} MiB are exchanged at a time"]


def _exchange(run: DryRun) -> list[str]:
    """Describe strategies and layout, the choice of "auto", and the bytes that a rank sends."""
    if run.ranks == 1:
        return ["strategies  none: every sequence stays on one process"]
    linear = len(run.config.linear_layers)
    kinds = {
        "linear": (linear, linear_costs, choose_linear),
        "softmax": (run.config.num_hidden_layers - linear, softmax_costs, choose_softmax),
    }
    lines = [f"layout      {run.layout}"]
    for kind, (layers, costs_of, choose) in kinds.items():
        if not layers:
            continue
        sizes = run.sizes(kind)
        costs = costs_of(sizes)
        best = choose(sizes, log=False)
        name = getattr(run.recipe.sequence_parallel, kind)
        chosen = best if name == "auto" else name
        if chosen not in costs:
            raise ValueError(
                f"{chosen} cannot divide the heads of the {kind} layers among {run.ranks} ranks; use {best}"
            )
        sent = layers * (costs[chosen].forward + costs[chosen].backward) / 2**20
        estimates = ", ".join(f"{other} {1e3 * cost.seconds:.3g}" for other, cost in costs.items())
        lines += [
            f"{kind:<12}{chosen}{' (auto)' if name == 'auto' else ''}: a rank sends {sent:,.3f} MiB in {layers} layers "
            "of a batch, forward and backward",
            f'            "auto" takes {best}; estimated ms a layer: {estimates}',
        ]
    return lines
