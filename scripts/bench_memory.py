"""The longest sequence that a model trains on one device, and where the memory goes, before and after each measure.

    python scripts/bench_memory.py [--memory 80 141] [--tokens 524288] [--out FILE.json]

Linear-Llama3-1B, purely linear and with every fourth layer softmax, in bfloat16 with AdamW, a row of one document. On a
GPU the lengths are found by bisection on real steps; elsewhere they are computed from the account of
`linear_llama3.trainer.memory_account`, for a GPU with the Triton kernels. A small model's steps are then measured here
beside their account, and the loss alone with and without logits.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.modeling import enable_sequence_tiling
from linear_llama3.ops import tiles
from linear_llama3.ops.cross_entropy import chunked_cross_entropy
from linear_llama3.trainer.memory import allocated_peak
from linear_llama3.trainer.memory_account import MemoryAccount, memory_account

MODELS = ("linear-llama3-1b-basic-pure", "linear-llama3-1b-basic-hybrid-1-4")
MEASURES: dict[str, dict[str, bool]] = {  # each beside those before it
    "none": {"chunked_loss": False},
    "loss in pieces": {"chunked_loss": True},
    "checkpointing": {"checkpointing": True},
    "tiles": {"tiling": True},
    "offload": {"offload": True},
}
STEP = 4096  # lengths are multiples of it
USABLE = 0.95  # of a device: its context, and what allocators cannot use, take the rest
SMALL = {  # a model for CPUs; its tiles are small as well
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_value_heads": 4,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SMALL_TOKENS, SMALL_TILE = 2048, 2**18


def measures() -> list[tuple[str, dict[str, bool]]]:
    """Their names, and what is switched on with each."""
    switched: dict[str, bool] = {}
    return [(name, switched := switched | more) for name, more in MEASURES.items()]


def longest(fits: Callable[[int], bool]) -> int:
    """The most tokens that fit, to 2 %."""
    high = 1
    while fits(high * STEP):
        high *= 2
    low = high // 2
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle)
    return low * STEP


def training_step(
    model: LinearLlama3ForCausalLM,
    tokens: int,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    chunked_loss: bool,
    checkpointing: bool = False,
    tiling: bool = False,
    offload: bool = False,
) -> Callable[[], None]:
    """A step on one row; gradients stay where they are."""
    enable_sequence_tiling(model, tiling)
    if checkpointing:  # releases before 5.23 have the old name only
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False}, offload=offload)
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)

    def step() -> None:
        model(input_ids=ids, labels=ids, num_items_in_batch=tokens, skip_logits=chunked_loss).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    return step


def measured_bytes(config: LinearLlama3Config, tokens: int, switched: dict[str, bool]) -> int:
    """Bytes of two real steps on this GPU, more than any device has if they do not fit."""
    try:
        with torch.device("cuda"):
            model = LinearLlama3ForCausalLM(config).bfloat16().train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        step = training_step(model, tokens, optimizer, **switched)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):  # the first makes gradients and states of the optimizer
            step()
        return torch.cuda.max_memory_allocated()
    except torch.cuda.OutOfMemoryError:
        return 2**60
    finally:
        model = optimizer = step = None  # type: ignore[assignment]
        gc.collect()
        torch.cuda.empty_cache()


def account(config: LinearLlama3Config, tokens: int, switched: dict[str, bool]) -> MemoryAccount:
    return memory_account(config, tokens=tokens, weights=torch.bfloat16, **switched)


def lengths(name: str, goal: int, memories: list[float]) -> list[dict[str, Any]]:
    """One row for every measure: the longest lengths, and the account of the goal."""
    config, rows = LinearLlama3Config.from_preset(name), []
    gpu = torch.cuda.is_available()
    for measure, switched in measures():
        at_goal = account(config, goal, switched)

        def needed(tokens: int, switched: dict[str, bool] = switched) -> int:
            return measured_bytes(config, tokens, switched) if gpu else account(config, tokens, switched).total

        found = {f"{gb:g}": longest(lambda n, limit=USABLE * gb * 1e9: needed(n) <= limit) for gb in memories}
        rows.append({
            "model": name, "measure": measure, "how": "measured" if gpu else "computed", "longest": found,
            "goal": goal, "goal_bytes": needed(goal), "goal_account": at_goal.categories, "host": at_goal.host,
        })  # fmt: skip
    return rows


def small_steps() -> list[dict[str, Any]]:
    """A small model on this device: bytes that a step allocates, and its account."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole, tiles.TILE_NUMBERS = tiles.TILE_NUMBERS, SMALL_TILE
    rows = []
    for interval in (0, 4):
        config = LinearLlama3Config(**SMALL, full_attention_interval=interval)
        for measure, switched in measures()[:-1]:  # on a CPU, offloading has nowhere to go
            torch.manual_seed(0)
            model = LinearLlama3ForCausalLM(config).to(device, torch.bfloat16).train()
            step = training_step(model, SMALL_TOKENS, **switched)
            step()  # makes the gradients
            measured = allocated_peak(step)
            backend = "triton" if device == "cuda" else "chunked"
            whole_account = memory_account(
                config, tokens=SMALL_TOKENS, weights=torch.bfloat16, backend=backend, **switched
            )
            constant = sum(whole_account.categories[x] for x in ("weights", "gradients", "optimizer"))
            computed = whole_account.total - constant
            rows.append({
                "model": "hybrid 1/4" if interval else "pure", "measure": measure,
                "measured": measured, "account": computed, "ratio": computed / measured,
            })  # fmt: skip
    tiles.TILE_NUMBERS = whole
    return rows


def losses(hidden: int = 128, vocab_size: int = 128256) -> list[dict[str, Any]]:
    """The loss over Llama 3's vocabulary, forward and backward, with logits and without."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = nn.Linear(hidden, vocab_size, bias=False, device=device)
    rows = []
    for tokens in (512, 1024, 2048):
        x = torch.randn(tokens, hidden, device=device, requires_grad=True)
        targets = torch.randint(vocab_size, (tokens,), device=device)
        plain = allocated_peak(lambda x=x, y=targets: F.cross_entropy(head(x), y).backward())  # type: ignore[misc]
        chunked = allocated_peak(
            lambda x=x, y=targets: chunked_cross_entropy(x, y, head, vocab_size=vocab_size).backward()  # type: ignore[misc]
        )
        rows.append({"tokens": tokens, "plain": plain, "chunked": chunked})
    return rows


def print_lengths(rows: list[dict[str, Any]]) -> None:
    goal, memories = rows[0]["goal"], list(rows[0]["longest"])
    columns = ["weights, gradients, AdamW", "layer inputs", "inside layers", "head and loss", "total"]
    how = "measured" if rows[0]["how"] == "measured" else "computed from the account, not measured"
    print(f"\nBytes and lengths {how}; {USABLE:.0%} of a device are used. GB = 1e9 bytes.\n")
    print(f"| | {' | '.join(f'longest, {gb} GB' for gb in memories)} | {' | '.join(columns)} |")
    print("|---" * (1 + len(memories) + len(columns)) + "|")
    for row in rows:
        parts = row["goal_account"]
        constant = sum(parts[x] for x in ("weights", "gradients", "optimizer"))
        sizes = [constant, *(parts.get(x, 0) for x in columns[1:-1]), row["goal_bytes"]]
        cells = [*(f"{n:,}" for n in row["longest"].values()), *(f"{size / 1e9:.1f}" for size in sizes)]
        print(f"| {row['measure']} | {' | '.join(cells)} |")
    print(f"\nGB at {goal:,} tokens. {rows[-1]['host'] / 1e9:.1f} GB are in the host's memory with offload.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, nargs="+", default=[80, 141], help="of devices, in GB")
    parser.add_argument("--tokens", type=int, default=524288, help="the length at which memory is itemised")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    setting = {
        "date": date.today().isoformat(), "device": device,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    print(f"{device}, {setting['date']}, {setting['versions']}")
    result: dict[str, Any] = {**setting, "lengths": []}
    for name in MODELS:
        print(f"\n{name}")
        rows = lengths(name, options.tokens, options.memory)
        print_lengths(rows)
        result["lengths"] += rows
    result["small_steps"], result["losses"] = small_steps(), losses()
    print("\n| a small model's step on this device | measured MiB | account MiB | ratio |\n|---|---|---|---|")
    for row in result["small_steps"]:
        sizes = f"{row['measured'] / 2**20:.1f} | {row['account'] / 2**20:.1f} | {row['ratio']:.3f}"
        print(f"| {row['model']}, {row['measure']} | {sizes} |")
    print("\n| loss over 128,256 words, tokens | with logits, MiB | in pieces, MiB |\n|---|---|---|")
    for row in result["losses"]:
        print(f"| {row['tokens']:,} | {row['plain'] / 2**20:.0f} | {row['chunked'] / 2**20:.0f} |")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
