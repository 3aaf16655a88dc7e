"""Find the longest sequence that a model trains on one device, and where the memory goes, with each measure added.

    python scripts/bench_memory.py [--memory 80 139] [--tokens 524288] [--out FILE.json]

Linear-Llama3-1B, purely linear and with every fourth layer softmax, in bfloat16 with AdamW, a row of one document. On a
GPU the lengths are found by bisection on real steps; elsewhere they are computed, from the accounts
(`linear_llama3.trainer.memory.account`) of the goal and of half of it: bytes grow evenly with tokens. A small model's
steps are then measured here and compared with their account, and the loss alone with and without logits.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.modeling import enable_sequence_tiling
from linear_llama3.ops import token_tiles
from linear_llama3.ops.cross_entropy import chunked_cross_entropy
from linear_llama3.trainer.memory.account import MemoryAccount, memory_account
from linear_llama3.trainer.memory.peak import allocated_peak

MODELS = ("linear-llama3-1b-basic-pure", "linear-llama3-1b-basic-hybrid-1-4")
MEASURES: dict[str, dict[str, Any]] = {  # each in addition to those before it
    "none": {"chunked_loss": False},
    "loss in pieces": {"chunked_loss": True},
    "checkpointing": {"checkpointing": True},
    "tiles": {"tiling": True},
    "offload": {"offload": True},
}
STEP = 1024  # lengths are multiples of it
CONSTANT = ("weights", "gradients", "optimizer")
USABLE = 0.95  # of a device; the rest is for its context and for what allocators cannot use
SMALL = {  # a model for CPUs; its tiles are small as well
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_value_heads": 4,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SMALL_TOKENS, SMALL_TILE = 2048, 2**18


def measures() -> list[tuple[str, dict[str, Any]]]:
    """Return the names of the measures with the options that are on, cumulatively."""
    switched: dict[str, Any] = {}
    return [(name, switched := switched | more) for name, more in MEASURES.items()]


def longest(fits: Callable[[int], bool]) -> int:
    """Return the largest number of tokens that fits, to 2 %."""
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
    """Run a step on one row; gradients are kept."""
    enable_sequence_tiling(model, tiling)
    if checkpointing:  # releases before 5.23 have the old name only
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False}, offload=offload)
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)

    def step() -> None:
        model(input_ids=ids, labels=ids, num_items_in_batch=tokens, skip_logits=chunked_loss).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    return step


def measured_bytes(config: LinearLlama3Config, tokens: int, switched: dict[str, Any]) -> int:
    """Return the peak bytes of two real steps on this GPU; more than any device has if they do not fit."""
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


def account(config: LinearLlama3Config, tokens: int, switched: dict[str, Any]) -> MemoryAccount:
    return memory_account(config, tokens=tokens, dtype=torch.bfloat16, **switched)


def lengths(name: str, goal: int, memories: list[float]) -> Iterator[dict[str, Any]]:
    """Yield one row for every measure: the longest lengths, and the account of the goal."""
    config, gpu = LinearLlama3Config.from_preset(name), torch.cuda.is_available()
    for measure, switched in measures():
        half, full = (account(config, tokens, switched) for tokens in (goal // 2, goal))

        def needed(tokens: int, switched: dict[str, Any] = switched) -> int:
            return measured_bytes(config, tokens, switched) if gpu else account(config, tokens, switched).total

        def found(limit: float, half: int = half.total, full: int = full.total) -> int:
            if gpu:
                return longest(lambda tokens: needed(tokens) <= limit)
            slope = 2 * (full - half) / goal
            tokens = goal + (limit - full) / slope
            while tokens < goal // 2 and (excess := needed(int(tokens)) - limit) > 0:  # the loss may need most
                tokens -= max(STEP, excess / slope)
            return int(tokens) // STEP * STEP

        limits = {f"{gb:g}": USABLE * gb * 2**30 for gb in memories}
        yield {
            "model": name, "measure": measure, "how": "measured" if gpu else "computed",
            "longest": {gb: found(limit) for gb, limit in limits.items()},
            "goal": goal, "goal_bytes": needed(goal) if gpu else full.total,
            "goal_account": full.lines, "host": full.host,
        }  # fmt: skip


def small_steps() -> list[dict[str, Any]]:
    """Compare the bytes that a step of a small model allocates on this device with its account."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default_tile, token_tiles.TILE_NUMBERS = token_tiles.TILE_NUMBERS, SMALL_TILE
    rows = []
    for interval in (0, 4):
        config = LinearLlama3Config(**SMALL, full_attention_interval=interval)
        for measure, switched in measures()[:-1]:  # on a CPU, offloading has nowhere to go
            torch.manual_seed(0)
            model = LinearLlama3ForCausalLM(config).to(device, torch.bfloat16).train()
            step = training_step(model, SMALL_TOKENS, **switched)
            step()  # makes the gradients
            measured = allocated_peak(step)
            full_account = memory_account(
                config, tokens=SMALL_TOKENS, dtype=torch.bfloat16, gpu=device == "cuda", **switched
            )
            computed = full_account.total - sum(full_account.lines[x] for x in CONSTANT)
            rows.append({
                "model": "hybrid 1/4" if interval else "pure", "measure": measure,
                "measured": measured, "account": computed, "ratio": computed / measured,
            })  # fmt: skip
    token_tiles.TILE_NUMBERS = default_tile
    return rows


def losses(hidden: int = 128, vocab_size: int = 128256) -> list[dict[str, Any]]:
    """Measure the loss over Llama 3's vocabulary, forward and backward, with logits and without."""
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
    goal, memories, columns = (
        rows[0]["goal"],
        list(rows[0]["longest"]),
        ("layer inputs", "inside layers", "head and loss"),
    )
    how = "measured" if rows[0]["how"] == "measured" else "computed, not measured"
    print(f"\nBytes and lengths {how}; {USABLE:.0%} of a device are used. GiB at {goal:,} tokens.\n")
    titles = [*(f"longest, {gb} GiB" for gb in memories), "weights, gradients, AdamW", *columns, "total", "on the host"]
    print(f"| | {' | '.join(titles)} |")
    print("|---" * (1 + len(titles)) + "|")
    for row in rows:
        parts = row["goal_account"]
        sizes = [sum(parts[x] for x in CONSTANT), *(parts.get(x, 0) for x in columns), row["goal_bytes"], row["host"]]
        cells = [*(f"{n:,}" for n in row["longest"].values()), *(f"{size / 2**30:.1f}" for size in sizes)]
        print(f"| {row['measure']} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, nargs="+", default=[80, 139], help="of devices, in GiB")
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
    result["small_steps"], result["losses"] = small_steps(), losses()
    print("\n| a small model's step on this device | measured MiB | account MiB | ratio |\n|---|---|---|---|")
    for row in result["small_steps"]:
        sizes = f"{row['measured'] / 2**20:.1f} | {row['account'] / 2**20:.1f} | {row['ratio']:.3f}"
        print(f"| {row['model']}, {row['measure']} | {sizes} |")
    print("\n| loss over 128,256 words, tokens | with logits, MiB | in pieces, MiB |\n|---|---|---|")
    for row in result["losses"]:
        print(f"| {row['tokens']:,} | {row['plain'] / 2**20:.0f} | {row['chunked'] / 2**20:.0f} |")
    for name in MODELS:
        print(f"\n{name}")
        rows = list(lengths(name, options.tokens, options.memory))
        print_lengths(rows)
        result["lengths"] += rows
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
