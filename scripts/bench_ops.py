"""Linear attention on one device: the chunked form against the recurrence, time and memory.

    python scripts/bench_ops.py [--tokens 16384] [--out FILE.json]

Times are medians of forward, and of forward and backward, in one run on one machine; compare the ratios. Memory is
the growth of the process's peak over a forward and backward, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from linear_llama3.ops import linear_attention

HEADS, DIM = 8, 64
GATES = ("none", "head", "scalar", "channel")


def inputs(tokens: int, gate: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"head": (HEADS,), "scalar": (1, tokens, HEADS), "channel": (1, tokens, HEADS, DIM)}
    named = {name: torch.randn(1, tokens, HEADS, DIM, generator=generator) for name in "qkv"}
    if gate != "none":
        named["log_decay"] = -torch.rand(shapes[gate], generator=generator) / 16
    return named


def forward(variables: dict[str, Tensor], backend: str) -> None:
    with torch.no_grad():
        linear_attention(**variables, backend=backend)


def forward_backward(variables: dict[str, Tensor], backend: str) -> None:
    leaves = {name: x.detach().requires_grad_() for name, x in variables.items()}
    out, _ = linear_attention(**leaves, backend=backend)
    out.square().sum().backward()


def median_seconds(call, variables: dict[str, Tensor], backend: str, repeats: int) -> float:  # type: ignore[no-untyped-def]
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        call(variables, backend)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_memory(tokens: int, gate: str) -> float:
    """MiB that a chunked forward and backward adds to the inputs, in a new process."""
    code = f"import bench_ops; bench_ops.print_peak({tokens}, {gate!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    return float(done.stdout)


def print_peak(tokens: int, gate: str) -> None:
    forward_backward(inputs(256, gate), "chunked")  # what the first call of anything costs
    variables = inputs(tokens, gate)
    before = high_water_mark()
    forward_backward(variables, "chunked")
    print((high_water_mark() - before) / 1024)


def high_water_mark() -> int:
    """Peak resident memory of this process in KiB (Linux; ru_maxrss would include the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"B1 T{options.tokens} H{HEADS} D{DIM} float32, {hardware}, {date.today()}\n")
    print("| gate | pass | recurrent s | chunked s | ratio |\n|---|---|---|---|---|")
    rows, memory = [], []
    for gate in GATES:
        variables = inputs(options.tokens, gate)
        for name, call in (("forward", forward), ("forward + backward", forward_backward)):
            slow = median_seconds(call, variables, "recurrent", 3)
            fast = median_seconds(call, variables, "chunked", 5)
            rows.append({"gate": gate, "pass": name, "recurrent": slow, "chunked": fast, "ratio": slow / fast})
            print(f"| {gate} | {name} | {slow:.2f} | {fast:.3f} | {slow / fast:.0f} |", flush=True)

    lengths = [options.tokens * factor for factor in (1, 2, 4)]
    print(f"\n| gate | {' | '.join(f'MiB at T {n}' for n in lengths)} | bytes per token-head |")
    print("|---|" + "---|" * (len(lengths) + 1))
    for gate in GATES:
        peaks = [peak_memory(n, gate) for n in lengths]
        memory.append({"gate": gate, "mebibytes": dict(zip(map(str, lengths), peaks, strict=True))})
        slope = (peaks[-1] - peaks[0]) * 2**20 / (lengths[-1] - lengths[0]) / HEADS
        print(f"| {gate} | {' | '.join(f'{peak:.0f}' for peak in peaks)} | {slope:.0f} |", flush=True)
    if options.out:
        result = {"hardware": hardware, "date": str(date.today()), "times": rows, "memory": memory}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
