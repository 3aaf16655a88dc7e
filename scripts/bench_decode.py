"""Measure the cost of one decoded token after a short and after a long context.

    python scripts/bench_decode.py [--positions 1000 100000] [--models NAME ...] [--out FILE.json]

The model reads the complete context, in pieces if all layers are linear. Then single tokens are decoded on one thread,
in random order after the short and the long context, so that a noisy machine slows both. The output has medians and
their ratio. Softmax layers take minutes to read 100,000 tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_models import LLAMA, NAMES, describe, make_model, random_ids, save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

PIECE = 4096
DEFAULT = [name for name in NAMES if "pure" in name] + ["gla, hybrid 1/4", LLAMA]


def filled_cache(model: PreTrainedModel, tokens: int) -> Cache:
    layer_types = getattr(model.config, "layer_types", None) or ["full_attention"]
    piece = tokens if "full_attention" in layer_types else PIECE  # in pieces a softmax layer needs a mask
    cache = None
    for ids in random_ids(tokens).split(piece, dim=1):
        cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of the keys, values and states of all layers."""
    held: list[Any] = []
    for layer in cache.layers:
        held += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        held += getattr(layer, "recurrent_states", {}).values()
    return sum(x.nbytes for x in held if isinstance(x, Tensor))


def step_seconds(model: PreTrainedModel, caches: list[Cache], repeats: int) -> list[float]:
    """Return the median seconds of a step with each cache, taken in turns."""
    token, turns = random_ids(1), list(range(len(caches)))
    times: list[list[float]] = [[] for _ in caches]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(repeats + 3):  # the first ones warm up
        random.shuffle(turns)
        for turn in turns:
            start = time.perf_counter()
            model(token, past_key_values=caches[turn], use_cache=True)
            times[turn].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return [statistics.median(seconds[3:]) for seconds in times]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs=2, default=[1000, 100_000])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=DEFAULT)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    near, far = options.positions
    print(
        f"{describe()}\n\n| model | ms at {near} | ms at {far} | ratio | KiB of cache at {near} | at {far} |\n"
        + "|---" * 6
        + "|"
    )
    rows: list[dict[str, Any]] = []
    for name in options.models:
        model = make_model(name).eval()
        caches = [filled_cache(model, tokens) for tokens in (near, far)]
        held = [cache_bytes(cache) for cache in caches]
        seconds = step_seconds(model, caches, options.repeats)
        ratio = seconds[1] / seconds[0]
        rows.append({"model": name, "positions": [near, far], "seconds": seconds, "ratio": ratio, "cache_bytes": held})
        cells = [*(f"{1000 * x:.2f}" for x in seconds), f"{ratio:.2f}", *(f"{x / 1024:,.0f}" for x in held)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    save(options.out, rows)


if __name__ == "__main__":
    main()
