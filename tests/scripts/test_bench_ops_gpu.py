"""The benchmark of the kernels without a GPU: bytes, the peers' gates, and disagreements."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_llama3.ops import linear_attention

GATES = ("none", "head", "scalar", "channel")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import bench_ops_gpu

    return bench_ops_gpu


@pytest.fixture
def on_cpu(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the benchmark with tiny shapes on the CPU and a clock that reports one millisecond for everything."""

    def chunked(*inputs: Tensor, log_decay: Tensor | None, backend: str) -> tuple[Tensor, Tensor | None]:
        assert backend == "triton"
        return linear_attention(*inputs, log_decay=log_decay, backend="chunked")

    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "linear_attention", chunked)
    monkeypatch.setattr(bench, "milliseconds", lambda call, quick: call() and 1.0)
    monkeypatch.setattr(bench, "host_microseconds", lambda call: 10.0)
    monkeypatch.setattr(bench, "peak_mebibytes", lambda call: 5.0)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 4e12)
    monkeypatch.setattr(bench, "describe_machine", lambda: {"device": "none", "date": "today"})
    monkeypatch.setattr(bench, "SHAPES", (bench.Shape(2, 70, 2, dim=16), bench.Shape(1, 90, 4, dim=16, groups=2)))
    monkeypatch.setattr(bench, "SMALL", 300)
    return bench


def install_fla(monkeypatch: pytest.MonkeyPatch, **changes: Callable[..., Any]) -> None:
    """Install a stand-in with the signatures of flash-linear-attention that calls our own op."""

    def chunk_linear_attn(q: Tensor, k: Tensor, v: Tensor, normalize: bool = True) -> tuple[Tensor, Any]:
        return linear_attention(q, k, v, normalize=normalize)

    def chunk_simple_gla(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        assert (g is None) != (g_gamma is None)
        return linear_attention(q, k, v, log_decay=g if g_gamma is None else g_gamma)

    def chunk_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Any]:
        assert q.shape == k.shape == g.shape
        return linear_attention(q, k, v, log_decay=g)

    ops = types.ModuleType("fla.ops")
    named = {f.__name__: f for f in (chunk_linear_attn, chunk_simple_gla, chunk_gla)} | changes
    for name, function in named.items():
        setattr(ops, name, function)
    package = types.ModuleType("fla")
    package.__spec__ = ModuleSpec("fla", None)
    monkeypatch.setitem(sys.modules, "fla", package)
    monkeypatch.setitem(sys.modules, "fla.ops", ops)


def test_minimal_bytes_per_token_and_head(bench: Any) -> None:
    """Per token and head of 128 in bfloat16: 1024 forward, 1792 backward; a kv head's are shared by its query heads."""
    one = bench.Shape(1, 1, 1)
    assert bench.minimal_bytes(one, "none", "forward") == bench.minimal_bytes(one, "head", "forward") == 1024
    assert bench.minimal_bytes(one, "none", "forward + backward") == 1024 + 1792
    assert bench.minimal_bytes(bench.Shape(1, 1, 4, groups=4), "none", "forward") == 4 * 640
    assert bench.minimal_bytes(bench.Shape(2, 3, 8, dim=64), "none", "forward") == 2 * 3 * 8 * 512
    assert bench.minimal_bytes(one, "scalar", "forward + backward") == 1024 + 1792 + 3 * 4
    assert bench.minimal_bytes(one, "channel", "forward + backward") == 1024 + 1792 + 3 * 512
    assert bench.minimal_bytes(bench.Shape(1, 1, 4, groups=4), "channel", "forward") == 4 * 640 + 512


@pytest.mark.parametrize("gate", GATES)
def test_minimal_bytes_are_those_of_the_tensors(on_cpu: Any, gate: str) -> None:
    for shape in on_cpu.SHAPES:
        inputs = on_cpu.make_inputs(shape, gate)
        results = on_cpu.prepare(on_cpu.ours, inputs, "forward + backward")()
        sizes = {n: x.nbytes if x.dim() > 1 else 0 for n, x in (inputs | results).items()}
        read = sum(sizes[name] for name in inputs)
        assert on_cpu.minimal_bytes(shape, gate, "forward") == read + sizes["out"]
        written = sum(sizes[name] for name in results)  # output and gradients; the output's gradient is read
        assert on_cpu.minimal_bytes(shape, gate, "forward + backward") == 2 * read + written + sizes["out"]


def test_names_are_unique_and_quick_ones_small(bench: Any) -> None:
    names = [shape.name for shape in bench.SHAPES]
    assert len(set(names)) == len(names) == 7 and "B1_T32768_H32over8_D128" in names
    assert bench.QUICK == ("B4_T2048_H16_D128", "B8_T1024_H8_D64")


def options(bench: Any, **changes: Any) -> argparse.Namespace:
    shapes = [shape.name for shape in bench.SHAPES]
    return argparse.Namespace(
        **{"shapes": shapes, "gates": GATES, "peers": ("fla", "sdpa"), "quick": True, "out": None} | changes
    )


def test_a_run_reports_every_shape_gate_and_pass(
    on_cpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every shape, gate and pass, with peers that compute the same, also with grouped queries."""
    install_fla(monkeypatch)
    on_cpu.run(options(on_cpu, out=tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["rows"]) == 2 * 4 * 2 and result["setting"]["copy_bytes_per_second"] == 4e12
    for row in result["rows"]:
        assert row["ms"] == {"ours": 1.0, "fla": 1.0, "sdpa": 1.0}, row["notes"]
        assert row["host_us"].keys() == ({"ours", "fla", "sdpa"} if row["shape"] == "B2_T70_H2_D16" else set())
    assert (tmp_path / "result.png").stat().st_size > 10_000
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 * 4 * 2 and len({line.count("|") for line in table}) == 1
    assert " 1.00 | 1.00 | 0.000 | 0 | 5 / 5 / 5 | 10 / 10 / 10 |" in table[2]


def test_peers_that_disagree_or_fail_are_not_timed(on_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_percent_more(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Any]:
        return linear_attention(q, k, 1.02 * v, log_decay=g)

    def refuse(*_: Tensor, **__: Tensor) -> None:
        raise RuntimeError("not with this compiler")

    install_fla(monkeypatch, chunk_gla=two_percent_more, chunk_simple_gla=refuse)
    rows = list(on_cpu.measure_all(on_cpu.SHAPES[:1], GATES, ("fla",), quick=True))
    timed = {(row["gate"], tuple(row["ms"])) for row in rows}
    assert timed == {("none", ("ours", "fla")), ("head", ("ours",)), ("scalar", ("ours",)), ("channel", ())}
    disagrees, refuses = rows[-1]["notes"]["fla"], rows[2]["notes"]["fla"]
    assert "out 2." in disagrees and "dv 2." in disagrees and refuses == "RuntimeError: not with this compiler"
    assert on_cpu.table_row(rows[-1], 4e12).count(" - |") == 8
    assert on_cpu.notes(rows)[0].startswith("fla: RuntimeError: not with this compiler (B2_T70_H2_D16 forward head, ")


def test_fla_is_left_out_where_it_is_not_installed(
    on_cpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    assert on_cpu.present_peers(["fla", "sdpa"]) == ("sdpa",)
    assert "fla not installed: column left out" in capsys.readouterr().out


def test_sdpa_with_grouped_queries_equals_a_masked_softmax(on_cpu: Any) -> None:
    inputs = {name: x.float() for name, x in on_cpu.make_inputs(on_cpu.SHAPES[1], "none").items()}
    k, v = (inputs[name].repeat_interleave(2, dim=2) for name in "kv")
    scores = torch.einsum("bihd,bjhd->bhij", inputs["q"], k) / 4
    scores = scores.masked_fill(~torch.ones(90, 90, dtype=torch.bool).tril(), -torch.inf)
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    assert (on_cpu.sdpa(**inputs) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("gate", GATES)
def test_fla_accepts_these_arguments(bench: Any, gate: str) -> None:
    fla_ops = pytest.importorskip("fla.ops")
    name, given, gate_name = bench.FLA_OPS[gate]
    signature = inspect.signature(getattr(fla_ops, name))
    assert {*given, *([gate_name] if gate_name else [])} <= signature.parameters.keys()
