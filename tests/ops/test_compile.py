"""The op under `torch.compile`: one graph for all lengths, with the outputs and gradients of the recurrence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from linear_llama3.ops import linear_attention
from tests.helpers.attention_cases import GATES, Case
from tests.helpers.marks import needs_cxx


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(gate: str, tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    case = Case(
        tokens=tokens, gate=gate, batch=2, groups=2, key_dim=8, value_dim=6, strength=0.1,
        initial_state=True, dtype=dtype,
    )  # fmt: skip
    return {name: x for name, x in case.inputs().items() if name != "w"}


def run(call: Callable[..., Any], variables: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """Out, final state and the gradients of all inputs."""
    leaves = {name: x.clone().requires_grad_() for name, x in variables.items()}
    out, state = call(**leaves, output_final_state=True, **kwargs)
    weights = torch.arange(out.numel(), dtype=out.dtype).sin().view(out.shape)
    ((out * weights).sum() + state.square().sum()).backward()
    return {"out": out.detach(), "state": state.detach(), **{f"d_{name}": x.grad for name, x in leaves.items()}}


@pytest.mark.parametrize("gate", GATES)
def test_one_graph_for_all_lengths(gate: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_attention, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (100, 70, 1100):
        variables = inputs(gate, tokens)
        expected = run(linear_attention, variables, backend="recurrent")
        for name, got in run(compiled, variables).items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(got, expected[name], rtol=0, atol=1e-10 * scale, msg=name)
    assert counter.frame_count == 1


@needs_cxx
def test_inductor_under_autocast() -> None:
    variables = inputs("channel", 70, torch.float32)
    compiled = torch.compile(linear_attention, fullgraph=True, backend="inductor")
    expected = run(linear_attention, variables)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, got in run(compiled, variables).items():
            assert torch.equal(got, expected[name]), name


def test_one_token_is_traced() -> None:
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    variables = inputs("channel", 1)
    for name, got in run(compiled, variables).items():
        torch.testing.assert_close(got, run(linear_attention, variables, backend="recurrent")[name], msg=name)


@pytest.mark.parametrize("gate", GATES)
def test_shapes_without_storage(gate: str) -> None:
    """On torch's meta device, forward and backward."""
    variables: dict[str, Any] = {name: x.to("meta").requires_grad_() for name, x in inputs(gate, 1100).items()}
    out, state = linear_attention(**variables, output_final_state=True)
    assert out.shape == (2, 1100, 4, 6) and state is not None and state.shape == (2, 2, 8, 6)
    gradients = torch.autograd.grad((out.sum() + state.sum()), list(variables.values()))
    assert [x.shape for x in gradients] == [x.shape for x in variables.values()]
