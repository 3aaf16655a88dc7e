"""Compare linear attention on one GPU with flash-linear-attention, softmax attention and the memory bandwidth.

    python scripts/bench_ops_gpu.py [--shapes B4_T4096_H64_D128 ...] [--gates none head] [--peers fla sdpa] [--quick]
                                    [--out FILE.json]

Figures are medians of one run: forward, and forward and backward, in bfloat16 with gates in float32. The limit is the
time to move every input and output once (`minimal_bytes`) at the bandwidth of a large copy in the same run. Where
outputs or gradients of fla differ from ours, neither is timed. SDPA is torch's causal softmax attention with the kernel
that torch chooses. It has no gate, so its time is repeated in every row of a shape. FILE.json is written after every
row, so an interrupted run keeps its results. At the end a plot is saved as FILE.png.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from bench_ops_gpu_report import HEADER, notes, plot, table_row
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from linear_llama3.ops import linear_attention
from linear_llama3.ops.decays import lightning_log_decay

DEVICE = "cuda"
GATES = ("none", "head", "scalar", "channel")
PASSES = ("forward", "forward + backward")
# how flash-linear-attention 0.6.0 says it: the op, its options, the name of the gate
FLA_OPS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "none": ("chunk_linear_attn", {"normalize": False}, None),
    "head": ("chunk_simple_gla", {}, "g_gamma"),
    "scalar": ("chunk_simple_gla", {}, "g"),
    "channel": ("chunk_gla", {}, "g"),
}
# relative RMS between two that round differently; the gate's gradient is a difference of sums of what is rounded
BOUNDS = {"out": 1e-2, "dq": 1e-2, "dk": 1e-2, "dv": 1e-2, "dlog_decay": 5e-2}
SMALL = 2**17  # token-heads up to which the host's time counts

Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    heads: int
    dim: int = 128
    groups: int = 1  # query heads per kv head

    @property
    def name(self) -> str:
        heads = f"H{self.heads}" if self.groups == 1 else f"H{self.heads}over{self.heads // self.groups}"
        return f"B{self.batch}_T{self.tokens}_{heads}_D{self.dim}"

    @property
    def small(self) -> bool:
        return self.batch * self.tokens * self.heads <= SMALL


SHAPES = (
    Shape(4, 4096, 64),
    Shape(2, 16384, 16),
    Shape(1, 8192, 96),
    Shape(4, 2048, 16),
    Shape(8, 1024, 8, dim=64),
    Shape(1, 131072, 16),
    Shape(1, 32768, 32, groups=4),
)
QUICK = tuple(shape.name for shape in SHAPES if shape.small)


def minimal_bytes(shape: Shape, gate: str, which: str) -> int:
    """Return the bytes of an ideal kernel for each pass, which reads every input and writes every output once.

    With H query heads over H_kv kv heads of size D, in 2 bytes each, and G bytes of gate (float32; a constant: none):

        forward   q, out: 2 H D;  k, v: 2 H_kv D;  the gate: G
        backward  q, d_out, dq: 3 H D;  k, v, dk, dv: 4 H_kv D;  the gate and its gradient: 2 G
    """
    q_row = 2 * shape.heads * shape.dim
    kv_heads = shape.heads // shape.groups
    kv_row = 2 * kv_heads * shape.dim
    gate_row = {"scalar": 4 * kv_heads, "channel": 4 * kv_heads * shape.dim}.get(gate, 0)
    forward = 2 * q_row + 2 * kv_row + gate_row
    backward = 3 * q_row + 4 * kv_row + 2 * gate_row
    return shape.batch * shape.tokens * (forward if which == "forward" else forward + backward)


def make_inputs(shape: Shape, gate: str) -> dict[str, Tensor]:
    """Return q, k, v in bfloat16 and a log decay in float32, as the models of this package make them."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    rows, kv_heads = (shape.batch, shape.tokens), shape.heads // shape.groups

    def rand(*columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*rows, *columns, generator=generator, device=DEVICE, dtype=dtype)

    named = {n: rand(heads, shape.dim) for n, heads in (("q", shape.heads), ("k", kv_heads), ("v", kv_heads))}
    if gate == "head":
        named["log_decay"] = lightning_log_decay(kv_heads, 0, 2).to(DEVICE)
    elif gate != "none":
        columns = (kv_heads,) if gate == "scalar" else (kv_heads, shape.dim)
        named["log_decay"] = F.logsigmoid(rand(*columns, dtype=torch.float32)) / 16
    return named


def ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
    return linear_attention(q, k, v, log_decay=log_decay, backend="triton")[0]


def fla(gate: str) -> Attend:
    """Return a call of flash-linear-attention's op for this gate.

    Its states belong to query heads, so keys, values and gates are repeated for each, as its layers do.
    """
    name, options, gate_name = FLA_OPS[gate]
    op = getattr(importlib.import_module("fla.ops"), name)

    def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
        groups = q.shape[2] // k.shape[2]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
            if log_decay is not None:
                log_decay = log_decay.repeat_interleave(groups, dim=min(2, log_decay.dim() - 1))
        return op(q, k, v, **options, **({} if gate_name is None else {gate_name: log_decay}))[0]

    return attend


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(**sdpa_arguments(q, k, v)).transpose(1, 2)


def sdpa_arguments(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    return {"query": query, "key": key, "value": value, "is_causal": True, "enable_gqa": q.shape[2] != k.shape[2]}


def prepare(attend: Attend, tensors: dict[str, Tensor], which: str) -> Callable[[], dict[str, Tensor]]:
    """Return a call that computes the output and, in a backward pass, all gradients except that of a constant decay."""
    if which == "forward":

        def forward() -> dict[str, Tensor]:
            with torch.no_grad():
                return {"out": attend(**tensors)}

        return forward
    variables = {name: x.detach().requires_grad_() for name, x in tensors.items() if x.dim() > 1}
    constants = {name: x for name, x in tensors.items() if x.dim() == 1}
    upstream = torch.randn(
        tensors["q"].shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE, dtype=torch.bfloat16
    )

    def forward_backward() -> dict[str, Tensor]:
        out = attend(**variables, **constants)
        gradients = torch.autograd.grad(out, list(variables.values()), upstream)
        return {"out": out.detach(), **{f"d{n}": g for n, g in zip(variables, gradients, strict=True)}}

    return forward_backward


def disagreement(got: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """Name the results that differ by more than rounding; None if there are none."""
    errors = {}
    for name, x in expected.items():
        reference = x.float()
        errors[name] = ((got[name].float() - reference).norm() / reference.norm()).item()
    wrong = [f"{name} {e:.1e}" for name, e in errors.items() if not e < BOUNDS[name]]  # nan is wrong as well
    return f"disagrees with ours, relative RMS of {', '.join(wrong)}: not timed" if wrong else None


def milliseconds(call: Callable[[], Any], *, quick: bool) -> float:
    """Return the median time on the device, with a cold cache."""
    from triton.testing import do_bench

    warmup, repeat = (5, 20) if quick else (25, 100)
    return do_bench(call, warmup=warmup, rep=repeat, quantiles=(0.5, 0.2, 0.8))[0]


def host_microseconds(call: Callable[[], Any], calls: int = 20, repeats: int = 7) -> float:
    """Return the host's time per call without waiting for the device, a lower bound of the time of a call."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) / calls * 1e6


def peak_mebibytes(call: Callable[[], Any]) -> float:
    """Return the memory that a call adds to its inputs, outputs and gradients included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth(size: int = 2**31) -> float:
    """Return the bytes per second, read and written, of a copy inside the device's memory."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * size / (milliseconds(lambda: target.copy_(source), quick=False) / 1e3)


def describe_machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(DEVICE)
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id=GPU-{properties.uuid}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        answer = "unknown"
    return {
        "date": date.today().isoformat(),
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        **dict(zip(fields, answer.strip().split(", "), strict=False)),
        "versions": {name: version(name) for name in ("torch", "triton", "flash-linear-attention", "transformers")},
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def empty_row(**of: Any) -> dict[str, Any]:
    """Figures by implementation: "ours", "fla", "sdpa"; notes state why one is missing."""
    return {**of, "ms": {}, "peak_mib": {}, "host_us": {}, "notes": {}}


def measure(shape: Shape, gate: str, which: str, peers: tuple[str, ...], *, quick: bool) -> dict[str, Any]:
    """Measure ours and fla's; neither is timed where they disagree."""
    row = empty_row(**{"shape": shape.name, "gate": gate, "pass": which, "bytes": minimal_bytes(shape, gate, which)})
    tensors = make_inputs(shape, gate)
    calls = {"ours": prepare(ours, tensors, which)}
    if "fla" in peers:
        expected = calls["ours"]()
        try:
            call = prepare(fla(gate), tensors, which)
            wrong = disagreement(call(), expected)
        except Exception as error:  # a peer fails in its own ways: a version that it refuses, the compiler, memory
            row["notes"]["fla"] = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        else:
            if wrong:
                row["notes"]["fla"] = wrong
                return row
            calls["fla"] = call
    for name, call in calls.items():
        measure_call(row, name, call, shape, quick=quick)
    return row


def measure_call(row: dict[str, Any], name: str, call: Callable[[], Any], shape: Shape, *, quick: bool) -> None:
    call()  # compiles
    row["peak_mib"][name] = peak_mebibytes(call)
    row["ms"][name] = milliseconds(call, quick=quick)
    if shape.small:
        row["host_us"][name] = host_microseconds(call)


def measure_softmax(shape: Shape, which: str, *, quick: bool) -> dict[str, Any]:
    """Measure SDPA, which is the same for all gates."""
    row, tensors = empty_row(), make_inputs(shape, "none")
    row["notes"]["sdpa"] = SDPBackend(torch._fused_sdp_choice(**sdpa_arguments(**tensors))).name
    try:
        measure_call(row, "sdpa", prepare(sdpa, tensors, which), shape, quick=quick)
    except torch.OutOfMemoryError:
        row["notes"]["sdpa"] += ": out of memory"
    return row


def measure_all(
    shapes: list[Shape], gates: list[str], peers: tuple[str, ...], *, quick: bool
) -> Iterator[dict[str, Any]]:
    for shape in shapes:
        softmax = {w: measure_softmax(shape, w, quick=quick) if "sdpa" in peers else empty_row() for w in PASSES}
        for gate in gates:
            for which in PASSES:
                row = measure(shape, gate, which, peers, quick=quick)
                yield row | {key: row[key] | figures for key, figures in softmax[which].items()}
                torch.cuda.empty_cache()


def present_peers(wanted: list[str]) -> tuple[str, ...]:
    if "fla" in wanted and importlib.util.find_spec("fla") is None:
        print("fla not installed: column left out (pip install flash-linear-attention==0.6.0)")
        return tuple(peer for peer in wanted if peer != "fla")
    return tuple(wanted)


def run(options: argparse.Namespace) -> None:
    shapes = [shape for shape in SHAPES if shape.name in options.shapes]
    peers = present_peers(options.peers)
    bandwidth = copy_bandwidth()
    setting = describe_machine() | {"copy_bytes_per_second": bandwidth}  # now: the clocks of a busy device
    title = f"{setting['device']}, {setting['date']}, copies at {bandwidth / 1e12:.2f} TB/s"
    print(f"{title}; {setting}\n\n{HEADER}", flush=True)
    rows: list[dict[str, Any]] = []
    for row in measure_all(shapes, options.gates, peers, quick=options.quick):
        rows.append(row)
        print(table_row(row, bandwidth), flush=True)
        if options.out:
            options.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    print()
    for note in notes(rows):
        print(note)
    if options.out:
        plot(rows, options.out.with_suffix(".png"), title, bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, metavar="SHAPE", help=f"some of {' '.join(names)}")
    parser.add_argument("--gates", nargs="+", choices=GATES, default=GATES)
    parser.add_argument("--peers", nargs="*", choices=("fla", "sdpa"), default=("fla", "sdpa"))
    parser.add_argument("--quick", action="store_true", help="shorter, by default of the small shapes only")
    parser.add_argument("--out", type=Path, help="JSON; the plot is saved with the suffix .png")
    options = parser.parse_args()
    options.shapes = options.shapes or (QUICK if options.quick else names)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device; scripts/bench_ops.py measures CPUs")
    run(options)


if __name__ == "__main__":
    main()
