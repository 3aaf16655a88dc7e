"""Report what every kernel compiles to: registers, shared memory, spills, tensor-core instructions. Needs no GPU.

    python scripts/kernel_report.py [--capability 80 90] [--gates head channel] [--dims 64 128] ...

The launches are recorded from a forward and backward pass on tensors without data: what is compiled is what runs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from linear_llama3.ops.local_passes import LocalDocuments
from linear_llama3.ops.triton import launch
from linear_llama3.ops.triton.passes import TritonBackward, TritonForward

GATES = {"none": 0, "head": 1, "scalar": 3, "channel": 4}  # name -> dims of the log decay
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KERNELS = [name for name in vars(launch) if name.endswith("_kernel")]


@dataclass(frozen=True)
class Case:
    """One problem: head dims, query heads per kv head, and whether the gate learns."""

    gate: str
    dtype: str
    K: int
    V: int
    G: int
    learned: bool
    capability: int

    def __str__(self) -> str:
        learned = " learned" if self.learned else ""
        return f"sm_{self.capability} {self.gate}{learned} {self.dtype} K{self.K} V{self.V} G{self.G}"


@dataclass(frozen=True)
class Launch:
    kernel: str
    signature: tuple[tuple[str, str], ...]  # argument -> type, "constexpr" for those in `constants`
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    wgmma: int  # tensor-core instructions of Hopper,
    mma: int  # and of all others


def launches(case: Case) -> list[Launch]:
    """The launches of a forward and a backward pass with initial and final states, and of a decoding step."""
    made = lambda *shape: torch.empty(*shape, dtype=DTYPES[case.dtype], device="meta")  # noqa: E731
    heads, tokens = 8, 4096
    q, k = made(1, tokens, heads * case.G, case.K), made(1, tokens, heads, case.K)
    v, d_out = made(1, tokens, heads, case.V), made(1, tokens, heads * case.G, case.V)
    shape = {"none": None, "head": (heads,), "scalar": k.shape[:3], "channel": k.shape}[case.gate]
    log_decay = None if shape is None else torch.empty(shape, device="meta")
    state = torch.empty(1, heads, case.K, case.V, device="meta")
    documents = LocalDocuments.complete((0, tokens))
    with recorded(case.capability) as seen:
        forward = TritonForward(k, v, log_decay, documents, out_dtype=v.dtype)
        _, _, residuals = forward.output(q, 1.0, state.unsqueeze(0), final_states=True)
        backward = TritonBackward(
            q, k, v, log_decay, documents, residuals, d_out, 1.0, decay_learns=case.learned
        )  # fmt: skip
        backward.gradients(state.unsqueeze(0), initial_state=True)
        now = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, :1]
        launch.decode(q[:, :1], k[:, :1], v[:, :1], now, state, scale=1.0, dtype=v.dtype)
    return list(dict.fromkeys(seen))


@contextlib.contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Collects launches for such a device instead of running them."""
    seen: list[Launch] = []
    with contextlib.ExitStack() as patches:
        for name in KERNELS:
            recorder = _Recorder(name, getattr(launch, name), seen)
            patches.enter_context(mock.patch.object(launch, name, recorder))
        patches.enter_context(mock.patch.object(launch, "capability", lambda device: capability))
        yield seen


class _Recorder:
    def __init__(self, name: str, kernel: Any, seen: list[Launch]) -> None:
        self.name, self.kernel, self.seen = name, kernel, seen

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *args: Any, **named: Any) -> None:
        values = dict(zip(self.kernel.arg_names, args, strict=False))
        values |= {name: named.pop(name) for name in list(named) if name in self.kernel.arg_names}
        fixed = {p.name for p in self.kernel.params if p.is_constexpr}
        types = {name: "constexpr" if name in fixed or x is None else _type(x) for name, x in values.items()}
        self.seen.append(
            Launch(
                self.name,
                tuple(types.items()),
                tuple((name, values[name]) for name, kind in types.items() if kind == "constexpr"),
                tuple(i for i, (name, x) in enumerate(values.items()) if types[name] != "constexpr" and _aligned(x)),
                tuple(sorted(named.items())),
            )
        )


def _type(x: Any) -> str:
    if isinstance(x, Tensor):
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
        return "*" + names[x.dtype]
    return "fp32" if isinstance(x, float) else "i32" if abs(x) < 2**31 else "i64"


def _aligned(x: Any) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, int) and x % 16 == 0)


def compiled(launched: Launch, capability: int) -> Resources:
    """Compiles a launch for this target and asks the assembler."""
    attributes = {(i,): [["tt.divisibility", 16]] for i in launched.aligned}
    source = ASTSource(getattr(launch, launched.kernel), dict(launched.signature), dict(launched.constants), attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launched.options))
    ptx = built.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"-arch={architecture}", file.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Resources(
        registers=int(re.findall(r"Used (\d+) registers", log)[0]),
        spilled=int(re.findall(r"(\d+) bytes spill stores", log)[0]),
        shared=built.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
    )


def report(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """A row for every launch of every case; launches that cases share are compiled once."""
    wanted = [(case, launched) for case in cases for launched in launches(case)]
    unique = list(dict.fromkeys((launched, case.capability) for case, launched in wanted))
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(TRITON_CACHE_DIR=cache, TRITON_DEFAULT_FP_FUSION="1")
        with ProcessPoolExecutor() as pool:
            resources = dict(zip(unique, pool.map(compiled, *zip(*unique, strict=True)), strict=True))
    return [
        {"case": str(case), "kernel": x.kernel, **dict(x.options), **asdict(resources[x, case.capability])}
        for case, x in wanted
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4], help="query heads per kv head")
    options = parser.parse_args()
    cases = [
        Case(gate, dtype, dim, dim, groups, learned, capability)
        for capability, gate, dtype, dim, groups in itertools.product(
            options.capability, options.gates, options.dtypes, options.dims, options.groups
        )
        for learned in ((False, True) if gate in ("head", "scalar") else (gate == "channel",))
    ]
    print("| case | kernel | warps | stages | registers | spilled bytes | shared KiB | wgmma | mma |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in report(cases):
        cells = (
            row["case"], row["kernel"].removesuffix("_kernel"), row["num_warps"], row.get("num_stages", 3),
            row["registers"], row["spilled"], f"{row['shared'] / 1024:.0f}", row["wgmma"], row["mma"],
        )  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
