"""The Triton kernels under Triton's interpreter (no GPU needed) against the recurrence in float64.

The interpreter is right in float32 and float16; bfloat16 is tested on a GPU (test_triton_gpu.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_llama3.ops import linear_attention
from tests.helpers.attention_cases import GATES, Case, relative_error
from tests.helpers.marks import slow_unless
from tests.ops.test_linear_attention import documents_of, run

pytest.importorskip("triton")

from linear_llama3.ops.triton import launch, segments

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="with a GPU the kernels are compiled"),
    pytest.mark.usefixtures("poison"),
]

# o, dq, dk, dv, states; and the gate, whose gradient is a sum over many tokens
BOUNDS = {torch.float32: (2e-6, 5e-5), torch.float16: (1e-3, 3e-3)}


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Documents are cut every 128 tokens, so that states are merged."""
    monkeypatch.setattr(segments, "SHORTEST", 128)
    monkeypatch.setattr(segments, "processors", lambda device: 132)
    yield


def check(case: Case, *, loose: float = 1.0) -> None:
    """Output, final state and all gradients against the recurrence in float64."""
    got = run(case, "triton")
    expected = run(case, "recurrent", {name: x.double() for name, x in case.inputs().items()})
    for name, x in got.items():
        bound, gate_bound = BOUNDS[case.dtype]
        limit = loose * (gate_bound if name == "d_log_decay" else bound)
        assert relative_error(x.double(), expected[name]) < limit, (name, case)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("gate", GATES)
def test_equals_the_recurrence(gate: str) -> None:
    """Packed documents, one of several segments, GQA, initial states, the normalizer, head dims that are padded."""
    check(
        Case(
            tokens=180, gate=gate, groups=2, documents=(0, 20, 180), initial_state=True, normalize=True, heads=1,
            key_dim=20, value_dim=9, strength=0.1, dtype=torch.float32,
        )
    )  # fmt: skip


@slow_unless(lambda gate, dtype: False, gate=GATES, dtype=BOUNDS)
def test_every_length(gate: str, dtype: torch.dtype) -> None:
    for tokens in (1, 15, 16, 17, 63, 64, 65, 200, 256):
        check(Case(tokens=tokens, gate=gate, key_dim=16, value_dim=16, heads=1, strength=0.1, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
def test_every_size(gate: str) -> None:
    """Head dims that are not powers of two, more than a tile, different; GQA; batch; initial states; the normalizer."""
    sizes = ((40, 24), (17, 130), (130, 17), (153, 64))
    for i, (key_dim, value_dim) in enumerate(sizes):
        more = i % 2 == 0
        check(
            Case(
                tokens=70, gate=gate, key_dim=key_dim, value_dim=value_dim, groups=3 if more else 1, batch=1 + more,
                initial_state=more, normalize=more, strength=0.1, heads=2 - more, dtype=torch.float32,
            )
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize(("capability", "wide"), [(80, True), (80, False), (90, False)])
@pytest.mark.parametrize("gate", GATES)
def test_the_tiles_of_other_gpus_and_precisions(
    gate: str, capability: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter is a GPU of capability 90 with float32 tiles; here are the others, those of bfloat16 too."""
    choose = launch.configuration
    monkeypatch.setattr(
        launch,
        "configuration",
        lambda *args, **named: choose(*args, **{**named, "wide": wide, "capability": capability}),
    )
    for key_dim, value_dim in ((16, 64), (160, 72)):
        check(
            Case(
                tokens=200, gate=gate, key_dim=key_dim, value_dim=value_dim, heads=1, groups=2, documents=(0, 30, 200),
                initial_state=True, strength=0.1, dtype=torch.float32,
            )
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("gate", GATES)
def test_packed_documents_and_segments(gate: str) -> None:
    tokens = 300
    for documents, initial in product((None, documents_of(tokens), (0, 64, 65, tokens)), (False, True)):
        check(
            Case(
                tokens=tokens, gate=gate, groups=2, documents=documents, initial_state=initial, key_dim=16, heads=1,
                value_dim=8, batch=1 if documents else 2, strength=0.05, dtype=torch.float32,
            )
        )  # fmt: skip


@slow_unless(
    lambda gate, strength: gate == "channel" and strength == 60.0,
    gate=("head", "scalar", "channel"), strength=(0.0, 1.0, 8.0, 60.0),
)  # fmt: skip
def test_any_decay(gate: str, strength: float) -> None:
    """None at all, and so strong that products of decays underflow and their inverses overflow."""
    case = Case(
        tokens=150, gate=gate, strength=strength, key_dim=16, value_dim=16, documents=(0, 50, 150), dtype=torch.float32
    )
    check(case, loose=1 if strength < 1 else 5)


@slow_unless(lambda gate: gate == "channel", gate=("head", "scalar", "channel"))
def test_a_gate_that_forgets_everything(gate: str) -> None:
    inputs = {n: x.float() for n, x in Case(tokens=70, gate=gate, key_dim=16, value_dim=16).inputs().items()}
    w, inputs["log_decay"] = inputs.pop("w"), torch.full_like(inputs["log_decay"], -torch.inf)
    variables = {name: x.requires_grad_(name != "log_decay") for name, x in inputs.items()}
    outs = [linear_attention(**variables, backend=backend)[0] for backend in ("triton", "recurrent")]
    gradients = [torch.autograd.grad((out * w).sum(), [variables[n] for n in "qkv"]) for out in outs]
    for got, expected in zip((outs[0], *gradients[0]), (outs[1], *gradients[1]), strict=True):
        assert relative_error(got, expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
def test_segments_change_rounding_only(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tokens=520, gate=gate, key_dim=16, value_dim=16, strength=0.02, dtype=torch.float32)
    complete = run(case, "triton")
    monkeypatch.setattr(segments, "SHORTEST", 128)
    monkeypatch.setattr(segments, "processors", lambda device: 132)
    for name, x in run(case, "triton").items():
        assert relative_error(x, complete[name]) < (1e-5 if name == "d_log_decay" else 1e-6), name


@pytest.mark.slow
def test_the_same_bits_every_time() -> None:
    for gate in GATES:
        case = Case(tokens=140, gate=gate, groups=2, key_dim=16, value_dim=16, strength=0.1, dtype=torch.float32)
        first, second = run(case, "triton"), run(case, "triton")
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_bfloat16_inputs() -> None:
    """The interpreter multiplies them in float32: types of what goes in and out."""
    case = Case(tokens=70, gate="channel", key_dim=16, value_dim=16, initial_state=True, dtype=torch.bfloat16)
    got = run(case, "triton")
    expected = run(case, "recurrent", {name: x.double() for name, x in case.inputs().items()})
    assert got["out"].dtype == torch.bfloat16 and got["state"].dtype == torch.float32
    assert all(relative_error(x.double(), expected[name]) < 2e-2 for name, x in got.items())


def test_strided_inputs() -> None:
    inputs = {n: x.float() for n, x in Case(tokens=70, gate="channel", key_dim=16, value_dim=16).inputs().items()}
    del inputs["w"]
    strided = {name: x.repeat_interleave(2, dim=-1)[..., ::2] for name, x in inputs.items()}
    transposed = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    expected = linear_attention(**inputs, backend="triton")[0]
    for variables in (strided, transposed):
        assert torch.equal(linear_attention(**variables, backend="triton")[0], expected)


@slow_unless(lambda gate, groups: gate == "scalar" and groups == 3, gate=GATES, groups=(1, 3))
def test_decoding_continues_a_prefill(gate: str, groups: int) -> None:
    case = Case(tokens=70, gate=gate, groups=groups, batch=2, key_dim=20, value_dim=33, dtype=torch.float32)
    inputs = {name: x for name, x in case.inputs().items() if name != "w"}
    complete, end = linear_attention(**inputs, output_final_state=True, backend="triton")

    def part(start: int, stop: int) -> dict[str, Any]:
        return {name: x if x.dim() == 1 else x[:, start:stop] for name, x in inputs.items()}

    _, state = linear_attention(**part(0, 66), output_final_state=True, backend="triton")
    for t in range(66, 70):
        before = state
        out, state = linear_attention(**part(t, t + 1), initial_state=state, output_final_state=True, backend="triton")
        assert before is not None and state is not None and not torch.equal(before, state)
        assert relative_error(out, complete[:, t : t + 1]) < 1e-5
    assert state is not None and end is not None and relative_error(state, end) < 1e-5


@slow_unless(
    lambda gate, packed, initial: gate == "channel" and packed and initial,
    gate=GATES, packed=(False, True), initial=(False, True),
)  # fmt: skip
def test_compiles_without_a_break(gate: str, packed: bool, initial: bool) -> None:
    case = Case(
        tokens=70, gate=gate, key_dim=16, value_dim=8, initial_state=initial, dtype=torch.float32,
        documents=(0, 30, 70) if packed else None,
    )  # fmt: skip
    variables = {name: x.requires_grad_() for name, x in case.inputs().items() if name != "w"}

    def both(q: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        out, state = linear_attention(
            q * 2, **rest, cu_seqlens=case.cu_seqlens(), output_final_state=True, backend="triton"
        )
        assert state is not None
        return out + 1, state

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    results = []
    for function in (both, compiled):
        out, state = function(**variables)
        gradients = torch.autograd.grad(out.square().sum() + state.square().sum(), list(variables.values()))
        results.append((out, state, *gradients))
    for plain, traced in zip(*results, strict=True):
        assert torch.equal(plain, traced)


@slow_unless(
    lambda transposed, documents: transposed and documents is None,
    transposed=(False, True), documents=(None, (0, 10, 40)),
)  # fmt: skip
def test_the_op_is_registered_as_torch_expects(transposed: bool, documents: tuple[int, ...] | None) -> None:
    case = Case(
        tokens=40, gate="channel", key_dim=16, value_dim=8, initial_state=documents is None, documents=documents,
        dtype=torch.float32,
    )  # fmt: skip
    inputs = case.inputs()
    if transposed:
        inputs = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in inputs.items()}
    names = ("q", "k", "v", "log_decay", "initial_state")
    tensors = [inputs[name].requires_grad_() if name in inputs else None for name in names]
    arguments = (*tensors, case.cu_seqlens(), 0.3, True, torch.float32, "triton")
    registered = torch.ops.linear_llama3.linear_attention.default
    torch.library.opcheck(registered, arguments)
    assert torch.Tag.cudagraph_unsafe in registered.tags


def test_one_token_of_one_document() -> None:
    inputs = {name: x for name, x in Case(tokens=1, batch=3, dtype=torch.float32).inputs().items() if name != "w"}
    with pytest.raises(ValueError, match="cu_seqlens packs documents in a batch of 1, got a batch of 3"):
        linear_attention(**inputs, cu_seqlens=torch.tensor([0, 1]), backend="triton")


@slow_unless(lambda gate: gate == "scalar", gate=("head", "scalar", "channel"))
def test_a_gate_that_is_nan_shows(gate: str) -> None:
    inputs = {name: x for name, x in Case(tokens=70, gate=gate, dtype=torch.float32).inputs().items() if name != "w"}
    inputs["log_decay"].view(-1)[-1] = torch.nan
    out, state = linear_attention(**inputs, output_final_state=True, backend="triton")
    assert state is not None and state.isnan().any() and out[:, -1].isnan().any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "backend 'triton' takes bfloat16, float16 and float32, got torch.float64"),
        ({"key_dim": 257}, "backend 'triton' takes head dims D_k up to 256, got 257"),
        ({"causal": False}, "backend 'triton' is causal"),
        ({"batch": 4096, "heads": 16, "key_dim": 2, "value_dim": 2}, "takes B \\* H_kv up to 65535, got 4096 \\* 16"),
    ],
)
def test_what_it_cannot_serve_is_refused(changes: dict[str, Any], message: str) -> None:
    case = Case(tokens=4, **{"dtype": torch.float32, **changes})
    with pytest.raises(ValueError, match=message):
        run(case, "triton")


@pytest.mark.slow
def test_a_cpu_is_refused() -> None:
    """In a process whose kernels are compiled."""
    code = (
        "import torch; from linear_llama3.ops import linear_attention; "
        "x = torch.zeros(1, 4, 1, 16); linear_attention(x, x, x, backend='triton')"
    )
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ValueError: backend 'triton' needs a CUDA device, got cpu" in done.stderr
