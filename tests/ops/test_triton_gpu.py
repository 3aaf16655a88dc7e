"""The kernels on a GPU, in the precisions that users have, and what only a GPU can show.

Outputs, final states and all gradients, with upstream gradients on both, against the float64 recurrence.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_llama3.ops import linear_attention
from tests.helpers.attention_cases import GATES, Case, leaves, relative_error

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

HALF = torch.bfloat16
CASES = {
    "one_token": Case(tokens=1, key_dim=64, value_dim=64, initial_state=True),
    "D16": Case(tokens=15, batch=3, key_dim=16, value_dim=16),
    "D64_grouped": Case(tokens=63, batch=2, groups=4, key_dim=64, value_dim=64),
    "D64_to_D200": Case(tokens=65, key_dim=64, value_dim=200, initial_state=True),
    "D100_to_D24": Case(tokens=129, groups=2, key_dim=100, value_dim=24),
    "D128": Case(tokens=257, batch=2, heads=3, key_dim=128, value_dim=128, strength=0.05),
    "D153_to_D65": Case(tokens=200, key_dim=153, value_dim=65, strength=0.05, initial_state=True),
    "D256": Case(tokens=200, key_dim=256, value_dim=256, strength=0.05),
    "strong_decay": Case(tokens=200, key_dim=64, value_dim=64, groups=2, strength=10.0),
    "packed": Case(
        tokens=400, documents=(0, 1, 64, 130, 131, 400), groups=2, key_dim=64, value_dim=64, initial_state=True
    ),
    "segments": Case(tokens=4200, batch=2, key_dim=64, value_dim=64, strength=0.01, initial_state=True),
    "packed_segments": Case(tokens=4500, documents=(0, 100, 4400, 4500), key_dim=64, value_dim=64, strength=0.01),
}


# every shape in bfloat16; what compiles differently in the other precisions
RUNS = [(name, torch.bfloat16) for name in CASES]
RUNS += [(name, x) for name in ("D64_grouped", "D128", "D256", "packed") for x in (torch.float16, torch.float32)]


def made(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """On the device; gates and states in float32 at least, as models make them."""
    wide = {"log_decay": torch.promote_types(dtype, torch.float32)}
    wide["initial_state"] = wide["log_decay"]
    return {name: x.to(DEVICE, wide.get(name, dtype)) for name, x in case.inputs().items()}


def edges(case: Case) -> Tensor | None:
    return None if case.documents is None else torch.tensor(case.documents, dtype=torch.int32, device=DEVICE)


def run(inputs: dict[str, Tensor], cu_seqlens: Tensor | None = None, backend: str = "triton") -> dict[str, Tensor]:
    variables = leaves(inputs)
    out, state = linear_attention(**variables, cu_seqlens=cu_seqlens, output_final_state=True, backend=backend)
    assert state is not None
    upstream = torch.linspace(-1, 1, state.numel(), device=DEVICE).view_as(state).to(state.dtype)
    gradients = torch.autograd.grad((out, state), list(variables.values()), (inputs["w"], upstream))
    return {"out": out, "state": state, **{f"d_{n}": g for n, g in zip(variables, gradients, strict=True)}}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Allocations hold nan until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def bound(name: str, gate: str, dtype: torch.dtype) -> float:
    if name == "state":
        return 1e-5 if dtype == torch.float32 else 1e-3
    if name == "d_log_decay":  # of a constant: a sum over all tokens, in which most cancels
        return 1e-4 if dtype == torch.float32 else 1e-2 if gate == "head" else 5e-3
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}[dtype]


def assert_equal_to(expected: dict[str, Tensor], got: dict[str, Tensor], gate: str, dtype: torch.dtype) -> None:
    errors = {name: relative_error(got[name].double(), x.double()) for name, x in expected.items()}
    wrong = {name: error for name, error in errors.items() if not error < bound(name, gate, dtype)}
    assert not wrong, f"{wrong}, of all: {errors}"


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=lambda x: str(x).removeprefix("torch."))
def test_equals_the_recurrence(name: str, gate: str, dtype: torch.dtype) -> None:
    case = replace(CASES[name], gate=gate)
    inputs, cu_seqlens = made(case, dtype), edges(case)
    expected = run({n: x.double() for n, x in inputs.items()}, cu_seqlens, "recurrent")
    with poisoned():
        got = run(inputs, cu_seqlens)
    assert got["out"].dtype == dtype and got["state"].dtype == torch.float32
    assert_equal_to(expected, got, gate, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("gate", GATES)
def test_rounding_does_not_grow_with_the_length(gate: str, dtype: torch.dtype) -> None:
    """Nothing fades: without a gate, or with gates of exactly 0, whose gradients sum up the most."""
    inputs = made(Case(tokens=32768, gate=gate, strength=0.0, key_dim=128, value_dim=128), dtype)
    expected = run({name: x.double() for name, x in inputs.items()}, backend="chunked")
    assert_equal_to(expected, run(inputs), gate, dtype)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["packed", "segments"])
def test_the_same_bits_every_time(name: str, gate: str) -> None:
    case = replace(CASES[name], gate=gate)
    inputs, cu_seqlens = made(case, HALF), edges(case)
    first = run(inputs, cu_seqlens)
    for _ in range(5):
        again = run(inputs, cu_seqlens)
        assert all(torch.equal(again[n], x) for n, x in first.items())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["D128", "packed", "segments"])
def test_compiles_in_one_graph(name: str, gate: str) -> None:
    case = replace(CASES[name], gate=gate)
    inputs, cu_seqlens = made(case, HALF), edges(case)
    w = inputs.pop("w")

    def attend(variables: dict[str, Any]) -> Tensor:
        return linear_attention(**variables, cu_seqlens=cu_seqlens, backend="triton")[0]

    def out_and_gradients(function: Callable[[dict[str, Any]], Tensor]) -> list[Tensor]:
        variables = leaves(inputs)
        out = function(variables)
        return [out, *torch.autograd.grad(out, list(variables.values()), w)]

    torch.compiler.reset()
    compiled = out_and_gradients(torch.compile(attend, fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled, out_and_gradients(attend), strict=True))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["D128", "packed", "segments"])
def test_the_host_never_waits(name: str, gate: str) -> None:
    """After the first call, which compiles, and reads the edges of documents."""
    case = replace(CASES[name], gate=gate)
    inputs, cu_seqlens = made(case, HALF), edges(case)
    run(inputs, cu_seqlens)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["one_token", "D128", "segments"])
def test_a_cuda_graph_replays_the_forward_pass(name: str, gate: str) -> None:
    inputs = made(replace(CASES[name], gate=gate), HALF)
    inputs.pop("w")

    def attend() -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            return linear_attention(**inputs, output_final_state=True, backend="triton")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, state = attend()
    for tokens in range(2, 100):  # the last tables are other lengths'
        linear_attention(*(torch.rand(1, tokens, 1, 16, device=DEVICE) for _ in "qkv"))
    for x in (inputs[n] for n in "qkv"):
        x.copy_(x.flip(1) + 1)  # other values in the same places
    graph.replay()
    expected, expected_state = attend()
    assert state is not None and expected_state is not None
    assert torch.equal(out, expected) and torch.equal(state, expected_state)


def test_a_model_compiled_to_cuda_graphs() -> None:
    inputs = made(replace(CASES["segments"], gate="channel"), HALF)
    w = inputs.pop("w")
    torch.compiler.reset()
    compiled = torch.compile(lambda **x: linear_attention(**x, backend="triton")[0] * 2, mode="reduce-overhead")
    for _ in range(4):  # warm-up, capture, replay
        variables = leaves(inputs)
        out = compiled(**variables)
        got = [out.clone(), *(g.clone() for g in torch.autograd.grad(out, list(variables.values()), w))]
    variables = leaves(inputs)
    out = linear_attention(**variables, backend="triton")[0] * 2
    expected = [out, *torch.autograd.grad(out, list(variables.values()), w)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_no_access_out_of_bounds() -> None:
    """Run under compute-sanitizer, with a separate allocation for every tensor."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    code = (
        "import itertools; from tests.ops.test_triton_gpu import *\n"
        "for name, gate in itertools.product(('D100_to_D24', 'packed'), GATES):\n"
        "    case = replace(CASES[name], gate=gate)\n"
        "    run(made(case, HALF), edges(case))\n"
        "torch.cuda.synchronize()"
    )
    command = [sanitizer, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    done = subprocess.run(
        [*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=600,
        cwd=Path(__file__).parents[2], env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
