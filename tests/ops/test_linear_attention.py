"""Linear attention on one device: the chunked form against the recurrence, outputs, states and every gradient."""

from __future__ import annotations

import functools
import itertools
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linear_llama3.ops import linear_attention
from tests.helpers.attention_cases import GATES, Case, leaves, relative_error
from tests.helpers.marks import slow_unless


def run(case: Case, backend: str, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Output, final state and all gradients, with upstream gradients on both."""
    inputs = inputs or case.inputs()
    variables = leaves(inputs)
    out, state = linear_attention(
        **variables,
        normalize=case.normalize,
        cu_seqlens=case.cu_seqlens(),
        causal=case.causal,
        output_final_state=True,
        backend=backend,
    )
    assert state is not None
    upstream = torch.linspace(-1, 1, state.numel(), dtype=state.dtype).view_as(state)
    loss = (out * inputs["w"]).sum() + (state * upstream).sum()
    gradients = torch.autograd.grad(loss, list(variables.values()))
    return {"out": out, "state": state, **{f"d_{n}": g for n, g in zip(variables, gradients, strict=True)}}


def documents_of(tokens: int) -> tuple[int, ...]:
    return tuple(sorted({0, 1, tokens // 3, tokens // 2, tokens}))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_chunked_equals_the_recurrence(gate: str, packed: bool) -> None:
    for tokens, groups, normalize, initial in product((1, 15, 65), (1, 3), (False, True), (False, True)):
        case = Case(
            tokens=tokens,
            gate=gate,
            batch=1 if packed else 2,
            groups=groups,
            normalize=normalize,
            initial_state=initial,
            documents=documents_of(tokens) if packed else None,
        )
        expected = run(case, "recurrent")
        for name, got in run(case, "chunked").items():
            assert (got - expected[name]).abs().max() < 1e-10, (name, case)


@pytest.mark.parametrize("gate", GATES)
def test_blocks_of_chunks_equal_the_recurrence(gate: str) -> None:
    """More tokens than one block of chunks holds, and documents of all sizes across the edges of blocks."""
    case = Case(tokens=1500, gate=gate, strength=0.05, documents=(0, 3, 1100, 1164, 1500), initial_state=True)
    expected = run(case, "recurrent")
    for name, got in run(case, "chunked").items():
        assert (got - expected[name]).abs().max() < 1e-9, name


@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strong_decay(gate: str, dtype: torch.dtype) -> None:
    """-30 a token: products of decays underflow and their inverses overflow."""
    case = Case(tokens=200, gate=gate, strength=30.0, groups=2, documents=(0, 50, 200), dtype=dtype)
    double = Case(tokens=200, gate=gate, strength=30.0, groups=2, documents=(0, 50, 200))
    expected = run(double, "recurrent")
    for name, got in run(case, "chunked").items():
        assert got.isfinite().all(), name
        bound = 1e-10 if dtype == torch.float64 else 1e-4
        assert (got - expected[name]).abs().max() < bound * (1 + expected[name].abs().max()), name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 5e-3)])
@pytest.mark.parametrize("gate", GATES)
def test_precision(gate: str, dtype: torch.dtype, bound: float) -> None:
    case = Case(tokens=520, gate=gate, strength=0.05, key_dim=16, value_dim=16, dtype=dtype)
    variables = leaves(case.inputs())
    double = {name: x.detach().double().requires_grad_() for name, x in variables.items()}
    w = case.inputs()["w"]
    out = linear_attention(**variables)[0]
    reference = linear_attention(**double, backend="recurrent")[0]
    assert out.dtype == dtype
    assert relative_error(out.double(), reference) < bound
    gradients = torch.autograd.grad((out * w).sum(), list(variables.values()))
    expected = torch.autograd.grad((reference * w.double()).sum(), list(double.values()))
    for name, got, e in zip(variables, gradients, expected, strict=True):
        loose = 10 if name == "log_decay" and dtype == torch.float32 else 1
        assert relative_error(got.double(), e) < bound * loose, name


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("strong", [-30.0, -torch.inf])
def test_weak_decay_behind_a_strong_one_is_exact(gate: str, strong: float) -> None:
    """Many strong gates in a chunk make the cumulated decay large, and its float32 differences coarse."""
    case = Case(tokens=128, gate=gate, strength=0.01, groups=2)
    inputs = case.inputs()
    w = inputs.pop("w")
    inputs["log_decay"][:, ::3] = strong
    double = leaves(inputs)
    single = {name: x.detach().float().requires_grad_() for name, x in double.items()}
    reference = linear_attention(**double, backend="recurrent")[0]
    out = linear_attention(**single)[0]
    assert relative_error(out.double(), reference) < 1e-6
    expected = torch.autograd.grad((reference * w).sum(), list(double.values()))
    got = torch.autograd.grad((out * w.float()).sum(), list(single.values()))
    for name, a, b in zip(double, got, expected, strict=True):
        assert relative_error(a.double(), b) < 1e-5, name


@slow_unless(
    lambda gate, strength, documents: strength == 8.0 and documents is not None,
    gate=GATES[1:], strength=(0.1, 2.0, 8.0), documents=(None, (0, 50, 200)),
)  # fmt: skip
def test_gradient_of_a_uniform_strong_decay(gate: str, strength: float, documents: tuple[int, ...] | None) -> None:
    """Pairs of different tokens are e^{-strength} of a token's pair with itself, which no decay is part of."""
    case = Case(tokens=200, gate=gate, groups=2, key_dim=16, value_dim=16, documents=documents, initial_state=True)
    inputs = {name: x.float() for name, x in case.inputs().items()}
    w = inputs.pop("w")
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -strength)
    single, double = leaves(inputs), leaves({name: x.double() for name, x in inputs.items()})
    out = linear_attention(**single, cu_seqlens=case.cu_seqlens(), backend="chunked")[0]
    reference = linear_attention(**double, cu_seqlens=case.cu_seqlens(), backend="recurrent")[0]
    (got,) = torch.autograd.grad((out * w).sum(), single["log_decay"])
    (expected,) = torch.autograd.grad((reference * w.double()).sum(), double["log_decay"])
    assert relative_error(got.double(), expected) < 1e-5


@slow_unless(lambda backend, gate: backend == "chunked" or gate == "head", backend=("chunked", "triton"), gate=GATES)
def test_only_some_inputs_learn(gate: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled there: test_triton_gpu.py")
    inputs = {n: x.float() for n, x in Case(tokens=70, gate=gate, initial_state=True).inputs().items()}
    w = inputs.pop("w")
    for learning in (("q",), ("k", "v"), ("log_decay",), ("initial_state",), ("q", "initial_state")):
        variables = {name: x.clone().requires_grad_(name in learning) for name, x in inputs.items()}
        wanted = [variables[name] for name in learning if name in variables]
        if not wanted:
            continue
        got, expected = (
            torch.autograd.grad((linear_attention(**variables, backend=b)[0] * w).sum(), wanted)
            for b in (backend, "recurrent")
        )
        for a, b in zip(got, expected, strict=True):
            assert relative_error(a, b) < 1e-5, learning


@slow_unless(lambda backend, gate: gate == "scalar", backend=("chunked", "triton"), gate=GATES)
def test_gradients_of_the_final_state_alone(gate: str, backend: str) -> None:
    """Nothing flows through the outputs; with gradient checkpointing, which allows one look at saved tensors."""
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled there: test_triton_gpu.py")
    variables = leaves({n: x.float() for n, x in Case(tokens=70, gate=gate, initial_state=True).inputs().items()})

    def gradients(backend: str) -> tuple[Tensor, ...]:
        attend = functools.partial(linear_attention, output_final_state=True, backend=backend)
        _, state = checkpoint(attend, **variables, use_reentrant=False)
        learned = [x for name, x in variables.items() if name != "q"]
        return torch.autograd.grad(state.square().sum(), learned)

    for got, expected in zip(gradients(backend), gradients("recurrent"), strict=True):
        assert relative_error(got, expected) < 1e-5


def test_autocast_does_not_round_the_inside() -> None:
    inputs = {n: x.float() for n, x in Case(tokens=200, gate="scalar", strength=0.01).inputs().items() if n != "w"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = linear_attention(**inputs, output_final_state=True)
    plain, plain_state = linear_attention(**inputs, output_final_state=True)
    assert torch.equal(out, plain)
    assert state is not None and plain_state is not None and torch.equal(state, plain_state)


def test_state_is_float32_for_half_inputs() -> None:
    q = torch.randn(1, 5, 2, 4, dtype=torch.bfloat16)
    for backend in ("recurrent", "chunked"):
        _, state = linear_attention(q, q, q, output_final_state=True, backend=backend)
        assert state is not None and state.dtype == torch.float32


@pytest.mark.parametrize("gate", GATES)
def test_state_carries_over_any_split(gate: str) -> None:
    """Prefill in pieces and decoding token by token equal one pass."""
    inputs = Case(tokens=90, gate=gate, batch=2, groups=2).inputs()
    inputs.pop("w")
    complete, final = linear_attention(**inputs, output_final_state=True)
    outs, state = [], None
    for start, stop in ((0, 40), (40, 41), (41, 88), (88, 89), (89, 90)):
        part = {n: x if x.dim() == 1 else x[:, start:stop] for n, x in inputs.items()}
        out, state = linear_attention(**part, initial_state=state, output_final_state=True)
        outs.append(out)
    assert (torch.cat(outs, 1) - complete).abs().max() < 1e-12
    assert state is not None and final is not None
    assert (state - final).abs().max() < 1e-12


@pytest.mark.parametrize("documents", [None, (0, 1, 30, 70)])
@pytest.mark.parametrize("normalize", [False, True])
def test_bidirectional_is_the_full_product(documents: tuple[int, ...] | None, normalize: bool) -> None:
    """`causal=False`: o = (q k^T) v over the complete document, as one matrix product without a mask."""
    case = Case(tokens=70, groups=2, documents=documents, normalize=normalize, causal=False)
    got = run(case, "chunked")
    inputs = case.inputs()
    variables = leaves(inputs)
    k, v = (variables[n].repeat_interleave(2, dim=2) for n in "kv")
    document = torch.bucketize(torch.arange(70), torch.tensor(documents or (0, 70)), right=True)
    scores = torch.einsum("bihd,bjhd->bhij", variables["q"], k) * 5**-0.5
    scores = scores * (document[:, None] == document[None, :])
    scores = scores / scores.sum(-1, keepdim=True) if normalize else scores
    out = torch.einsum("bhij,bjhd->bihd", scores, v)
    assert (got["out"] - out).abs().max() < 1e-10
    state = got["state"]
    assert state.shape == (1 if documents is None else 3, 2, 5, 3 + normalize)
    gradients = torch.autograd.grad((out * inputs["w"]).sum(), list(variables.values()))
    got_out = linear_attention(**variables, normalize=normalize, cu_seqlens=case.cu_seqlens(), causal=False)[0]
    for a, b in zip(
        torch.autograd.grad((got_out * inputs["w"]).sum(), list(variables.values())), gradients, strict=True
    ):
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("backend", ["recurrent", "chunked"])
def test_documents_without_tokens(backend: str, with_state: bool, normalize: bool) -> None:
    """Each document equals the recurrence on it alone. An empty one keeps its initial state, also in the gradient."""
    edges = [0, 0, 3, 3, 3, 8, 9, 9]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, heads, 3, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    log_decay = torch.nn.functional.logsigmoid(torch.randn(1, 9, 2, dtype=torch.float64)).requires_grad_()
    initial = torch.randn(7, 2, 3, 3 + normalize, dtype=torch.float64).requires_grad_() if with_state else None
    learnt = [x for x in (q, k, v, log_decay, initial) if x is not None]
    outs, states = [], []
    for n, (start, stop) in enumerate(itertools.pairwise(edges)):
        state: Tensor | None = torch.zeros(1, 2, 3, 3 + normalize).double() if initial is None else initial[n : n + 1]
        if start < stop:
            part = [x[:, start:stop] for x in (q, k, v)]
            out, state = linear_attention(
                *part, log_decay=log_decay[:, start:stop], normalize=normalize, initial_state=state,
                output_final_state=True, backend="recurrent",
            )  # fmt: skip
            outs.append(out)
        assert state is not None
        states.append(state)
    expected = torch.cat(outs, 1), torch.cat(states)
    out, state = linear_attention(
        q, k, v, log_decay=log_decay, normalize=normalize, initial_state=initial, output_final_state=True,
        cu_seqlens=torch.tensor(edges), backend=backend,
    )  # fmt: skip
    assert state is not None
    got = out, state
    weights = [torch.randn_like(x) for x in expected]
    gradients = [torch.autograd.grad(results, learnt, weights) for results in (got, expected)]
    for found, definition in zip([*got, *gradients[0]], [*expected, *gradients[1]], strict=True):
        torch.testing.assert_close(found, definition, rtol=1e-10, atol=1e-10)
    assert linear_attention(q, k, v, cu_seqlens=torch.tensor(edges), backend=backend)[1] is None


def test_causal() -> None:
    """A changed token changes nothing before it."""
    inputs = Case(tokens=100, gate="channel").inputs()
    inputs.pop("w")
    before = linear_attention(**inputs)[0]
    for name in inputs:
        inputs[name][:, 60] += 1 if name != "log_decay" else -1
    after = linear_attention(**inputs)[0]
    assert torch.equal(before[:, :60], after[:, :60])
    assert not torch.allclose(before[:, 60:], after[:, 60:])


def arguments(**changes: Any) -> dict[str, Any]:
    x = torch.ones(1, 4, 2, 3)
    return {"q": x, "k": x, "v": x} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(4, 2, 3)}, r"q must be \[B, T, H, D\]"),
        ({"k": torch.ones(1, 5, 2, 3)}, "must agree in B, T"),
        ({"v": torch.ones(1, 4, 1, 3)}, "must agree in B, T"),
        ({"k": torch.ones(1, 4, 2, 5)}, "D_k"),
        ({"q": torch.ones(1, 4, 3, 3)}, "H_q must be a multiple of H_kv, got H_q = 3 and H_kv = 2"),
        ({"q": torch.ones(1, 4, 2, 3).half()}, "share a floating dtype"),
        ({n: torch.ones(1, 0, 2, 3) for n in "qkv"}, "at least one token"),
        ({"log_decay": torch.tensor([-1.0, 0.5])}, "constant log_decay must be <= 0.*got 0.5"),
        ({"log_decay": torch.zeros(3)}, r"log_decay must be \[H_kv\]"),
        ({"log_decay": torch.zeros(2), "causal": False}, "causal=False allows no decay"),
        ({"cu_seqlens": torch.tensor([1, 4])}, "must start at 0, increase, and end at T = 4"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "end at T = 4"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "increase"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "integer"),
        (
            {**{n: torch.ones(2, 4, 2, 3) for n in "qkv"}, "cu_seqlens": torch.tensor([0, 4])},
            "batch of 1, got a batch of 2",
        ),
        ({"initial_state": torch.ones(1, 2, 3, 4)}, r"initial_state must be"),
        ({"initial_state": torch.ones(1, 2, 3, 3), "normalize": True}, r"D_v \+ 1"),
        ({"backend": "cuda"}, "backend must be 'auto' or one of .*got 'cuda'"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments(**changes))
