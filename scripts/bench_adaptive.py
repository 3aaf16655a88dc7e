"""Compare adaptive groups with one degree for all, in one run, on documents as long as Wikipedia's articles.

    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc_per_node 4 scripts/bench_adaptive.py RECIPE.yaml
    ACCELERATE_USE_CPU=true python scripts/slow_network.py 4 1gbit python scripts/bench_adaptive.py RECIPE.yaml

Three ways take turns, each as a run of the recipe's Trainer: "adaptive"; "static": the same rows in the same steps, in
groups of all ranks, packed by the planner; "rows": documents packed by best fit into rows that all ranks share
(`sequence_parallel_size: auto`), with the same number of steps and about the same number of tokens. The first step of a
turn does not count.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, GradientState
from transformers import TrainerCallback, default_data_collator

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.sequence_parallel.planner import load_profile
from linear_llama3.sequence_parallel.planner.lengths import read_lengths
from linear_llama3.trainer import LinearLlama3Trainer
from linear_llama3.trainer.adaptive.profiling import hardware
from linear_llama3.trainer.data import packing
from linear_llama3.trainer.recipes.build import build_config, load_tokenizer
from linear_llama3.trainer.recipes.recipe import Recipe, load_recipe

WAYS = ("adaptive", "static", "rows")


class Watch(TrainerCallback):
    """Record the seconds from the end of each step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        dist.barrier()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return np.diff(self.ends).tolist()


class StaticTrainer(LinearLlama3Trainer):
    """Adaptive groups restricted to one degree, all ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.adaptive_groups is not None
        degree, costs = self.args.world_size, self.adaptive_groups.costs
        self.adaptive_groups.costs = replace(costs, by_degree={degree: costs.by_degree[degree]})


def documents(count: int, longest: int, vocabulary: int) -> list[dict[str, np.ndarray]]:
    """Return random tokens; lengths are drawn from those of Wikipedia's articles."""
    draws = np.random.default_rng(0)
    rows = [draws.integers(vocabulary, size=n) for n in read_lengths("wikipedia", count).clip(max=longest)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def turn(way: str, recipe: Recipe, data: list[Any], rows: int, steps: int) -> tuple[list[float], list[Any]]:
    """Return the seconds of every step except the first, and the log."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0)
    model = LinearLlama3ForCausalLM(build_config(recipe, load_tokenizer(recipe)))
    parallel = recipe.sequence_parallel
    if way == "rows":
        parallel = replace(parallel, size="auto", profile=None)
        packed = packing.pack(data, length=recipe.sequence_length, packing="best_fit", long_documents="cut", padding=0)
        data = [{name: torch.as_tensor(x).long() for name, x in row.items()} for row in packed]
        rows = max(1, len(data) // (steps + 1))
    changes = {"per_device_train_batch_size": rows, "max_steps": steps + 1, "disable_tqdm": True, "logging_steps": 1}
    recipe = replace(recipe, sequence_parallel=parallel, training={**recipe.training, **changes})
    watch = Watch()
    trainer = (StaticTrainer if way == "static" else LinearLlama3Trainer)(
        model=model,
        args=recipe.training_arguments(),
        train_dataset=[{name: torch.as_tensor(x) for name, x in row.items()} for row in data],
        data_collator=default_data_collator,
        callbacks=[watch],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return watch.seconds, [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="of adaptive groups, whose profile was measured on this machine")
    parser.add_argument("--rows", type=int, default=16, help="documents of a step")
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("changes", nargs="*", help="of the recipe: section.key=value")
    arguments = parser.parse_intermixed_args()

    dist.init_process_group("gloo")
    recipe = load_recipe(arguments.recipe, arguments.changes)
    world, first = dist.get_world_size(), dist.get_rank() == 0
    data = documents(arguments.rows * (arguments.steps + 1), recipe.sequence_length, len(load_tokenizer(recipe)))
    seconds: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    logs: dict[str, list[Any]] = {}
    for number in range(arguments.turns):
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            own, logs[way] = turn(way, recipe, data, arguments.rows // world, arguments.steps)
            seconds[way].append(own)
            if first:
                print(f"turn {number}, {way}: {' '.join(f'{x:.2f}' for x in own)} s", flush=True)
    if first:
        report(arguments, recipe, seconds, logs, data)
    dist.barrier()
    dist.destroy_process_group()


def report(arguments: Any, recipe: Recipe, seconds: dict[str, Any], logs: dict[str, list[Any]], data: Any) -> None:
    """Return medians over the turns; steps of "adaptive" and "static" hold the same rows, those of "rows" others."""
    by_step = {way: np.median(np.array(own), axis=0) for way, own in seconds.items()}
    totals = {way: float(own.sum()) for way, own in by_step.items()}
    tokens = {way: logs[way][-1]["num_input_tokens_seen"] - logs[way][0]["num_input_tokens_seen"] for way in WAYS}
    lengths = [len(row["input_ids"]) for row in data]
    profile = load_profile(recipe.sequence_parallel.profile or "")
    by_turn = [sum(static) / sum(own) for static, own in zip(seconds["static"], seconds["adaptive"], strict=True)]
    result = {
        "hardware": hardware(torch.device("cpu")),
        "date": f"{datetime.date.today()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": " ".join(sys.argv),
        "network": "links between namespaces, their rate limited" if "GLOO_SOCKET_IFNAME" in os.environ else "one host",
        "processes": dist.get_world_size(),
        "model": recipe.model,
        "lengths": {"mean": np.mean(lengths), "median": np.median(lengths), "longest": max(lengths)},
        "profile": asdict(profile),
        "tokens": tokens,
        "seconds": {way: np.array(own).round(4).tolist() for way, own in seconds.items()},
        "seconds of all steps, medians": totals,
        "static / adaptive": totals["static"] / totals["adaptive"],
        "static / adaptive of every turn": by_turn,
        "tokens a second, adaptive / rows": (tokens["adaptive"] / totals["adaptive"])
        / (tokens["rows"] / totals["rows"]),
        "predicted": {
            way: [entry["predicted_step_seconds"] for entry in logs[way][1:]] for way in ("adaptive", "static")
        },
        "groups": [{k: v for k, v in entry.items() if k.startswith("groups_of")} for entry in logs["adaptive"][1:]],
        "losses": {way: [entry["loss"] for entry in logs[way]] for way in WAYS},
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
