"""Compare all strategies: messages, bytes, memory, time and error of one attention layer.

    python scripts/bench_sequence_parallel.py [--ranks 4 8] [--linear-lengths ...] [--softmax-lengths ...]
        [--strategies lasp2 ring/zigzag ...] [--link-rate 1gbit] [--out FILE.json] [--plot FILE.png]

Float32 on CPUs over gloo, forward and backward. Messages and bytes are counted below torch.distributed and set
against the cost model (`sequence_parallel/costs.py`); with --link-rate, which gives every rank a network namespace
and a link of that rate, also as the kernel counts them. The error is the largest difference from one device, of the
output and all gradients. Times are medians of the slowest rank; memory is what the pass adds to a rank, at its peak.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from slow_network import sent_bytes, slow_network, start_ranks
from torch import Tensor
from traffic import Traffic

from linear_llama3.ops import linear_attention as linear_on_one_device
from linear_llama3.sequence_parallel import LAYOUTS, LINEAR_STRATEGIES, SOFTMAX_STRATEGIES, shard
from linear_llama3.sequence_parallel import linear_attention as sharded_linear
from linear_llama3.sequence_parallel import softmax_attention as sharded_softmax
from linear_llama3.sequence_parallel.costs import Sizes, linear_costs, softmax_costs

CONFIGURATIONS = [
    *(f"{name}/contiguous" for name in LINEAR_STRATEGIES),
    "lasp2/zigzag",
    "lasp2h/contiguous",
    "lasp2h/zigzag",
    "ring/contiguous",
    "ring/zigzag",
    "token_ring/zigzag",
    "rsa/contiguous",
    "ulysses/contiguous",
]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings of the workers."""

    configurations: list[str]
    linear_lengths: list[int]
    softmax_lengths: list[int]
    q_heads: int
    kv_heads: int
    dim: int
    repeats: int


# ---- one rank ----


def work(job: Job, out: Path) -> None:
    """Measure everything; rank 0 writes the rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for linear, lengths in ((True, job.linear_lengths), (False, job.softmax_lengths)):
        strategies = LINEAR_STRATEGIES if linear else SOFTMAX_STRATEGIES
        chosen = [c for c in job.configurations if c.split("/")[0] in strategies]
        for tokens in lengths if chosen else ():
            complete = inputs(job, tokens)
            expected = None if dist.get_rank() else one_device(complete, linear)
            for configuration in chosen:
                rows.append(measure(job, configuration, tokens, complete, expected, linear))
                if dist.get_rank() == 0:
                    print(f"  W={dist.get_world_size()} T={tokens} {configuration}", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(rows))
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)  # gloo sometimes aborts at interpreter exit


def inputs(job: Job, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = {"q": job.q_heads, "k": job.kv_heads, "v": job.kv_heads, "w": job.q_heads}
    return {name: torch.randn(1, tokens, h, job.dim, generator=generator) for name, h in heads.items()}


def one_device(complete: dict[str, Tensor], linear: bool) -> list[Tensor]:
    leaves = [complete[name].clone().requires_grad_() for name in "qkv"]
    out = linear_on_one_device(*leaves)[0] if linear else sharded_softmax(*leaves, group=None)
    return [out.detach(), *torch.autograd.grad(out, leaves, complete["w"])]


def measure(
    job: Job, configuration: str, tokens: int, complete: dict[str, Tensor], expected: list[Tensor] | None, linear: bool
) -> dict[str, Any]:
    strategy, layout = configuration.split("/")
    where: dict[str, Any] = {"group": dist.group.WORLD, "layout": layout}
    local = {name: shard(x, **where).clone() for name, x in complete.items()}
    leaves = [local[name].requires_grad_() for name in "qkv"]
    op = sharded_linear if linear else sharded_softmax
    times: list[float] = []
    results: list[Tensor] = []
    for repeat in range(job.repeats + 1):  # the first one counts, and warms up
        results = []
        before, resident = sent_bytes(), reset_peak()
        dist.barrier()
        start = time.perf_counter()
        with Traffic() if repeat == 0 else nullcontext() as forward:
            out = op(*leaves, strategy=strategy, length=tokens, **where)
        with Traffic() if repeat == 0 else nullcontext() as backward:
            results = [out.detach(), *torch.autograd.grad(out, leaves, local["w"])]
        times.append(time.perf_counter() - start)
        if repeat == 0:
            assert isinstance(forward, Traffic) and isinstance(backward, Traffic)
            counted = {
                "forward": forward.bytes,
                "backward": backward.bytes,
                "messages": (forward.messages + backward.messages).total(),
                "on_the_wire": None if before is None else sent_bytes() - before,  # type: ignore[operator]
                "peak": peak() - resident,
            }
        del out
    own = {**counted, "times": times[1:], "error": error(results, expected, where, tokens)}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return summarize(job, strategy, layout, tokens, linear, ranks)


def error(results: list[Tensor], expected: list[Tensor] | None, where: dict[str, Any], tokens: int) -> float:
    """Return the error relative to the largest entry; every rank receives its part of the result of one device."""
    worst = 0.0
    for i, got in enumerate(results):
        shape = (1, tokens, *got.shape[2:])
        reference = torch.empty(shape) if expected is None else expected[i].contiguous()
        dist.broadcast(reference, 0)
        worst = max(worst, float((got - shard(reference, **where)).abs().max() / reference.abs().max()))
    return worst


def summarize(
    job: Job, strategy: str, layout: str, tokens: int, linear: bool, ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    sizes = Sizes(
        batch=1,
        tokens=tokens // len(ranks),
        q_heads=job.q_heads,
        kv_heads=job.kv_heads,
        key_dim=job.dim,
        value_dim=job.dim,
        element=4,
        ranks=len(ranks),
        chunks_per_rank=LAYOUTS[layout].chunks_per_rank,
        gpu=False,
    )
    theory = (linear_costs if linear else softmax_costs)(sizes)[strategy]
    mean = {name: statistics.mean(r[name] for r in ranks) for name in ("forward", "backward")}
    wire = [r["on_the_wire"] for r in ranks]
    return {
        "ranks": len(ranks),
        "tokens": tokens,
        "kind": "linear" if linear else "softmax",
        "strategy": strategy,
        "layout": layout,
        "messages": max(r["messages"] for r in ranks),
        "forward_bytes": mean["forward"],
        "backward_bytes": mean["backward"],
        "theory_forward_bytes": theory.forward,
        "theory_backward_bytes": theory.backward,
        "wire_bytes": None if None in wire else statistics.mean(wire),
        "peak_bytes": max(r["peak"] for r in ranks),
        "seconds": statistics.median(max(times) for times in zip(*(r["times"] for r in ranks), strict=True)),
        "error": max(r["error"] for r in ranks),
    }


def reset_peak() -> int:
    """Return freed memory to the system, reset Linux's high-water mark, and return the resident bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


# ---- all ranks ----


def run_ranks(ranks: int, job: Job, link_rate: str | None) -> list[dict[str, Any]]:
    """Return the rows of one number of ranks."""
    with (
        tempfile.TemporaryDirectory() as folder,
        slow_network(ranks, link_rate) if link_rate else nullcontext([]) as namespaces,
    ):
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(job)), "--out", str(out)]
        start_ranks(command, ranks, namespaces)
        return json.loads(out.read_text())


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table for each kind of layer; a cell holds the figures of all lengths. Bytes in MiB per rank."""
    for kind in ("linear", "softmax"):
        chosen = [row for row in rows if row["kind"] == kind]
        if not chosen:
            continue
        lengths = sorted({row["tokens"] for row in chosen})
        wire = any(row["wire_bytes"] is not None for row in chosen)
        header = ["W", f"{kind} layer, T = {' / '.join(map(str, lengths))}", "messages", "MiB sent", "theory"]
        header += ["on the wire"] * wire + ["peak MiB", "seconds", "error"]
        print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
        for ranks, strategy, layout in dict.fromkeys((r["ranks"], r["strategy"], r["layout"]) for r in chosen):
            line = [r for r in chosen if (r["ranks"], r["strategy"], r["layout"]) == (ranks, strategy, layout)]
            cells = [f"{ranks}", f"`{strategy}`, {layout}", f"{line[0]['messages']}"]
            cells.append(_figures([(r["forward_bytes"] + r["backward_bytes"]) / 2**20 for r in line]))
            cells.append(_figures([(r["theory_forward_bytes"] + r["theory_backward_bytes"]) / 2**20 for r in line]))
            cells += [_figures([(r["wire_bytes"] or 0) / 2**20 for r in line])] * wire
            cells += [_figures([r["peak_bytes"] / 2**20 for r in line], 0), _figures([r["seconds"] for r in line])]
            print("| " + " | ".join([*cells, f"{max(r['error'] for r in line):.0e}"]) + " |")
        print()


def _figures(values: list[float], digits: int = 2) -> str:
    """Return one figure if all are the same."""
    texts = [f"{value:.{digits}f}" for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot bytes and time over the length, a line for every strategy and number of ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2)
    for axis_row, kind in zip(axes, ("linear", "softmax"), strict=True):
        chosen = [row for row in rows if row["kind"] == kind]
        names = sorted({(row["strategy"], row["layout"]) for row in chosen})
        for ranks, style in zip(sorted({row["ranks"] for row in chosen}), ("-", "--", ":", "-."), strict=False):
            for i, (strategy, layout) in enumerate(names):
                line = [r for r in chosen if (r["ranks"], r["strategy"], r["layout"]) == (ranks, strategy, layout)]
                lengths = [r["tokens"] for r in line]
                sent = [(r["forward_bytes"] + r["backward_bytes"]) / 2**20 for r in line]
                options: dict[str, Any] = {
                    "linestyle": style,
                    "color": f"C{i}",
                    "marker": "os^vDPX"[i % 7],
                    "alpha": 0.7,
                }
                axis_row[0].plot(lengths, sent, label=f"{strategy}, {layout}, W={ranks}", **options)
                axis_row[1].plot(lengths, [r["seconds"] for r in line], **options)
        for axis, label in zip(axis_row, ("MiB sent per rank, forward + backward", "seconds"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label, title=f"{kind} layer")
            axis.set_xticks(lengths := sorted({row["tokens"] for row in chosen}), map(str, lengths))
            axis.minorticks_off()
        axis_row[0].legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--linear-lengths", type=int, nargs="*", default=[4096, 16384, 65536])
    parser.add_argument("--softmax-lengths", type=int, nargs="*", default=[2048, 4096, 8192])
    parser.add_argument("--strategies", nargs="+", default=CONFIGURATIONS, help="NAME/LAYOUT; default: %(default)s")
    parser.add_argument("--q-heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--link-rate", help="such as 1gbit: a namespace and a link of this rate for every rank")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Job(**json.loads(args.worker)), args.out)
    job = Job(
        configurations=[name if "/" in name else f"{name}/contiguous" for name in args.strategies],
        linear_lengths=args.linear_lengths,
        softmax_lengths=args.softmax_lengths,
        q_heads=args.q_heads,
        kv_heads=args.kv_heads,
        dim=args.dim,
        repeats=args.repeats,
    )
    rows = [row for ranks in args.ranks for row in run_ranks(ranks, job, args.link_rate)]
    print_tables(rows)
    setting = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores shared by all ranks",
        "torch": torch.__version__,
        "link_rate": args.link_rate,
        "sizes": asdict(job),
    }
    if args.out:
        args.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    if args.plot:
        link = f"links of {args.link_rate}" if args.link_rate else "one machine's loopback"
        heads = f"H_q {job.q_heads}, H_kv {job.kv_heads}, D {job.dim}, float32"
        plot(rows, args.plot, f"One attention layer, {heads}; {setting['machine']}, {link}, {setting['date']}")


if __name__ == "__main__":
    main()
