"""Compare a training step (forward, backward, AdamW) of models of one size with Llama and torch's softmax attention.

    python scripts/bench_training_step.py [--tokens 8192] [--models NAME ...] [--out FILE.json]

The models take turns, so that a noisy machine slows all of them. The output has medians and the ratio to Llama.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_models import LLAMA, NAMES, describe, make_model, random_ids, save
from torch import Tensor
from transformers import PreTrainedModel


def train_on(model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    """Run one step and return its seconds."""
    start = time.perf_counter()
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    ids = random_ids(options.tokens)
    models = {name: make_model(name).train() for name in dict.fromkeys([LLAMA, *options.models])}
    optimizers = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.repeats + 1):  # the first warms up
        for name, model in models.items():
            times[name].append(train_on(model, optimizers[name], ids))

    print(f"B1 T{options.tokens} {describe()}\n\n| model | parameters | seconds | Llama / model |\n|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    for name, seconds in medians.items():
        size, ratio = models[name].num_parameters(), medians[LLAMA] / seconds
        rows.append({"model": name, "parameters": size, "tokens": options.tokens, "seconds": seconds, "ratio": ratio})
        print(f"| {name} | {size / 1e6:.2f} M | {seconds:.2f} | {ratio:.2f} |")
    save(options.out, rows)


if __name__ == "__main__":
    main()
