"""Linear attention on one device: the chunked form against the recurrence and against peers, time and memory.

    python scripts/bench_ops.py [--tokens 16384] [--out FILE.json]

The peers are the core of transformers' MiniMax lightning attention (its module, projections and norm taken out) and
torch's causal softmax attention. Times are medians of forward, and of forward and backward, in one run on one machine;
compare the ratios. Memory is the growth of the process's peak over a forward and backward, each in its own process.
Where there is a GPU, `bench_ops_gpu.py` and its options take over.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from linear_llama3.ops import linear_attention
from linear_llama3.ops.decays import lightning_log_decay

HEADS, DIM = 8, 64
PEER_HEADS, PEER_LENGTHS = 16, (512, 1024, 2048, 4096, 8192)
GATES = ("none", "head", "scalar", "channel")


def inputs(tokens: int, gate: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"head": (HEADS,), "scalar": (1, tokens, HEADS), "channel": (1, tokens, HEADS, DIM)}
    named = {name: torch.randn(1, tokens, HEADS, DIM, generator=generator) for name in "qkv"}
    if gate != "none":
        named["log_decay"] = -torch.rand(shapes[gate], generator=generator) / 16
    return named


def forward(variables: dict[str, Any], backend: str) -> None:
    with torch.no_grad():
        linear_attention(**variables, backend=backend)


def forward_backward(variables: dict[str, Any], backend: str) -> None:
    leaves: dict[str, Any] = {name: x.detach().requires_grad_() for name, x in variables.items()}
    out, _ = linear_attention(**leaves, backend=backend)
    out.square().sum().backward()


def median_seconds(call, variables: dict[str, Tensor], backend: str, repeats: int) -> float:  # type: ignore[no-untyped-def]
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        call(variables, backend)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peer_inputs(tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(1, tokens, PEER_HEADS, DIM, generator=generator) for name in "qkv"}


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decay = lightning_log_decay(PEER_HEADS, 0, 2)
    return linear_attention(q, k, v, log_decay=decay, scale=1.0, backend="chunked")[0]


def minimax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    core = minimax_core()
    hidden = torch.cat([q, k, v], dim=-1).flatten(2)  # what its projection gives: q, k, v of each head
    return 2 * core(hidden, position_embeddings=None, attention_mask=None)[0].unflatten(2, (PEER_HEADS, DIM))


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


PEERS = {"chunked": chunked, "MiniMax": minimax, "softmax": softmax}


class NoGate(nn.Module):
    """sigmoid(0) = 1 / 2 on every output."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(1)


@functools.cache
def minimax_core() -> MiniMaxLightningAttention:
    config = MiniMaxConfig(
        hidden_size=PEER_HEADS * DIM, num_attention_heads=PEER_HEADS, head_dim=DIM, num_hidden_layers=2,
        layer_types=["linear_attention"] * 2,
    )  # fmt: skip
    core = MiniMaxLightningAttention(config, 0)
    core.act_fn = core.norm = core.qkv_proj = core.out_proj = nn.Identity()
    core.output_gate = NoGate()
    return core


def peer_forward(variables: dict[str, Tensor], peer: str) -> None:
    with torch.no_grad():
        PEERS[peer](**variables)


def peer_forward_backward(variables: dict[str, Tensor], peer: str) -> None:
    leaves = {name: x.detach().requires_grad_() for name, x in variables.items()}
    PEERS[peer](**leaves).square().sum().backward()


def compare_with_peers() -> list[dict[str, object]]:
    """Measure seconds at growing lengths, and the memory of the longest."""
    columns = ["pass", "chunked s", "MiniMax s", "softmax s", "MiniMax / chunked", "softmax / chunked"]
    print(f"\n| B1 H{PEER_HEADS} D{DIM}, T | {' | '.join(columns)} |\n" + "|---" * 7 + "|")
    rows: list[dict[str, object]] = []
    for tokens in PEER_LENGTHS:
        variables = peer_inputs(tokens)
        ours, theirs = chunked(**variables), minimax(**variables)
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max(), "not the same function"
        for name, call in (("forward", peer_forward), ("forward + backward", peer_forward_backward)):
            seconds = {peer: median_seconds(call, variables, peer, 5) for peer in PEERS}
            rows.append({"tokens": tokens, "pass": name, **seconds})
            ratios = [seconds[peer] / seconds["chunked"] for peer in ("MiniMax", "softmax")]
            cells = [*(f"{x:.3f}" for x in seconds.values()), *(f"{x:.1f}" for x in ratios)]
            print(f"| {tokens} | {name} | {' | '.join(cells)} |", flush=True)
    peaks = {peer: peak_memory("peer", PEER_LENGTHS[-1], peer) for peer in PEERS}
    print(f"\nMiB at T {PEER_LENGTHS[-1]}: {', '.join(f'{peer} {peak:.0f}' for peer, peak in peaks.items())}")
    return [*rows, {"tokens": PEER_LENGTHS[-1], "mebibytes": peaks}]


def prepare(kind: str, tokens: int, name: str) -> Callable[[], None]:
    """Return a forward and backward with its inputs: of a gate's chunked form, or of a peer."""
    variables = inputs(tokens, name) if kind == "gate" else peer_inputs(tokens)
    if kind == "gate":
        return lambda: forward_backward(variables, "chunked")
    return lambda: peer_forward_backward(variables, name)


def peak_memory(kind: str, tokens: int, name: str) -> float:
    """Return the MiB that a forward and backward adds to the inputs, measured in a new process."""
    code = f"import bench_ops; bench_ops.print_peak({kind!r}, {tokens}, {name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    return float(done.stdout)


def print_peak(kind: str, tokens: int, name: str) -> None:
    prepare(kind, 256, name)()  # what the first call of anything costs
    call = prepare(kind, tokens, name)
    before = high_water_mark()
    call()
    print((high_water_mark() - before) / 1024)


def high_water_mark() -> int:
    """Return the peak resident memory of this process in KiB (Linux; ru_maxrss would include the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def main() -> None:
    if torch.cuda.is_available():
        import bench_ops_gpu

        return bench_ops_gpu.main()
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
        peaks = [peak_memory("gate", n, gate) for n in lengths]
        memory.append({"gate": gate, "mebibytes": dict(zip(map(str, lengths), peaks, strict=True))})
        slope = (peaks[-1] - peaks[0]) * 2**20 / (lengths[-1] - lengths[0]) / HEADS
        print(f"| {gate} | {' | '.join(f'{peak:.0f}' for peak in peaks)} | {slope:.0f} |", flush=True)
    peers = compare_with_peers()
    if options.out:
        result = {"hardware": hardware, "date": str(date.today()), "times": rows, "memory": memory, "peers": peers}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
