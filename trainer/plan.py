"""What a recipe will do, worked out without data, processes or a GPU: `linear-llama3 train RECIPE.yaml --dry-run`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling import LinearLlama3Config
from ..modeling.mixers import MIXERS
from ..modeling.presets import layer_pattern
from ..sequence_parallel import LAYOUTS
from ..sequence_parallel.costs import (
    Cost,
    Sizes,
    choose_linear,
    choose_softmax,
    linear_costs,
    softmax_costs,
)
from .arguments import LinearLlama3TrainingArguments
from .build import build_model, load_tokenizer
from .parallelism import resolve_parallelism
from .recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A recipe on a number of processes, all of one machine."""

    recipe: Recipe
    config: LinearLlama3Config
    parameters: int
    trained: int
    processes: int
    ranks: int  # that share every sequence
    gpu: bool

    @property
    def replicas(self) -> int:
        return self.processes // self.ranks

    @property
    def layout(self) -> str:
        if self.recipe.sequence_parallel.layout != "auto":
            return self.recipe.sequence_parallel.layout
        return "zigzag" if self.config.has_softmax_layers else "contiguous"

    @property
    def tokens(self) -> int:
        """Of a row, on a rank."""
        length = self.recipe.sequence_length
        return LAYOUTS[self.layout].padded(length, self.ranks) // self.ranks if self.ranks > 1 else length

    def setting(self, name: str) -> Any:
        """A field of the section `training`, or its default; TrainingArguments would ask for the device."""
        fields = {f.name: f.default for f in dataclasses.fields(LinearLlama3TrainingArguments)}
        return self.recipe.training.get(name, fields[name])

    def sizes(self, kind: str) -> Sizes:
        """A linear or softmax layer, as the strategies' cost model sees it."""
        config, rows = self.config, self.setting("per_device_train_batch_size")
        packed = self.recipe.data.packing != "none"  # then rows lie end to end
        half = self.setting("bf16") or self.setting("fp16") or self.recipe.model.get("dtype") in ("bfloat16", "float16")
        assert config.num_key_value_heads is not None and config.head_dim is not None
        heads, key_dim, value_dim = config.num_key_value_heads, config.head_dim, config.head_dim
        decays = False
        if kind == "linear":
            heads, key_dim, value_dim = config.linear_state_shape
            mixer = MIXERS[config.linear_attention_type]
            decays = packed or mixer.learned_decay is not None or mixer.constant_log_decay is not None
        return Sizes(
            batch=1 if packed else rows,
            tokens=self.tokens * (rows if packed else 1),
            q_heads=config.num_attention_heads,
            kv_heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            element=2 if half else 4,
            ranks=self.ranks,
            chunks_per_rank=LAYOUTS[self.layout].chunks_per_rank,
            decays=decays,
            gpu=self.gpu,
        )


def plan(recipe: Recipe, processes: int, *, gpu: bool) -> Plan:
    """Raises ValueError for a recipe or a number of processes with which no run would start."""
    grid = resolve_parallelism(None, recipe.sequence_parallel.size, processes)
    tokenizer = load_tokenizer(recipe)
    with torch.device("meta"):
        model = build_model(recipe, tokenizer, weights=False)
    parameters = list(model.parameters())
    return Plan(
        recipe=recipe,
        config=model.config,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        processes=processes,
        ranks=1 if grid is None else grid.cp_size,
        gpu=gpu,
    )


def describe(plan: Plan) -> str:
    """The plan as lines for the terminal."""
    rows, accumulated = plan.setting("per_device_train_batch_size"), plan.setting("gradient_accumulation_steps")
    length, config = plan.recipe.sequence_length, plan.config
    trained = f", {plan.trained:,} of them trained" if plan.trained < plan.parameters else ""
    lines = [
        f"model       {plan.parameters:,} parameters{trained}; layers {layer_pattern(config)} "
        f"(L {config.linear_attention_type}, N softmax)",
        f"step        {plan.replicas * accumulated * rows * length:,} tokens: {plan.replicas} replicas x {accumulated} "
        f"accumulated batches x {rows} rows x {length:,}",
        f"grid        {plan.replicas} data-parallel x {plan.ranks} sequence-parallel processes on "
        f"{'GPUs' if plan.gpu else 'the CPU'}, {plan.tokens:,} tokens of every row each",
    ]
    for first in range(0, plan.processes, plan.ranks):
        last = first + plan.ranks - 1
        members = f"rank {first}" if first == last else f"ranks {first} to {last}"
        lines.append(f"              rows of replica {first // plan.ranks}: {members}")
    return "\n".join([*lines, *_exchange(plan)])


def _exchange(plan: Plan) -> list[str]:
    """Strategies and layout, what "auto" would choose, and what a rank sends."""
    if plan.ranks == 1:
        return ["strategies  none: every sequence stays on one process"]
    kinds = {
        "linear": (len(plan.config.linear_layers), linear_costs, choose_linear),
        "softmax": (plan.config.num_hidden_layers - len(plan.config.linear_layers), softmax_costs, choose_softmax),
    }
    lines = [f"layout      {plan.layout}"]
    for kind, (layers, costs_of, choose) in kinds.items():
        if not layers:
            continue
        sizes = plan.sizes(kind)
        costs: dict[str, Cost] = costs_of(sizes)
        best = choose(sizes, log=False)
        name = getattr(plan.recipe.sequence_parallel, kind)
        chosen = best if name == "auto" else name
        if chosen not in costs:
            raise ValueError(
                f"{chosen} cannot divide the heads of the {kind} layers among {plan.ranks} ranks; use {best}"
            )
        sent = layers * (costs[chosen].forward + costs[chosen].backward) / 2**20
        estimates = ", ".join(f"{other} {1e3 * cost.seconds:.3g}" for other, cost in costs.items())
        lines += [
            f"{kind:<12}{chosen}{' (auto)' if name == 'auto' else ''}: a rank sends {sent:,.2f} MiB in {layers} layers "
            "of a batch, forward and backward",
            f'              "auto" takes {best}; estimated ms a layer: {estimates}',
        ]
    return lines
