"""Sharded linear attention on the Triton kernels, interpreted, against the recurrence on one device in float64."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from linear_llama3.ops import linear_attention as one_device
from linear_llama3.sequence_parallel import LAYOUTS, LINEAR_STRATEGIES
from linear_llama3.sequence_parallel.linear import lasp2
from tests.helpers.attention_cases import GATES, Case, join, leaves, relative_error
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed
from tests.sequence_parallel.test_linear import Result, sharded_run

pytest.importorskip("triton")

from linear_llama3.ops.triton import launch, segments

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="gloo shares tensors of the CPU")


def cases(gate: str) -> list[Case]:
    sizes: dict[str, Any] = {"gate": gate, "key_dim": 16, "value_dim": 8, "dtype": torch.float32, "strength": 0.1}
    return [
        Case(tokens=2, **sizes),  # ranks without a token
        Case(tokens=37, batch=2, groups=2, normalize=True, heads=1, **sizes),
        Case(tokens=45, documents=(0, 1, 2, 20, 44, 45), groups=3, heads=1, **sizes),
        Case(tokens=600, documents=(0, 5, 540, 600), heads=1, **sizes),  # several segments on a rank
    ]


LINEAR_STRATEGIES_OF = dict(zip(GATES, LINEAR_STRATEGIES, strict=True))  # every strategy once


def run_cases(all_cases: list[Case], strategy: str, layout: str) -> list[tuple[np.ndarray, Result]]:
    with patch.object(segments, "SHORTEST", 128), patch.object(segments, "processors", lambda device: 132):
        return [sharded_run(case, strategy, layout, backend="triton") for case in all_cases]


def complete_run(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = {name: x.double() for name, x in case.inputs().items()}
    variables = leaves(inputs)
    out, _ = one_device(**variables, normalize=case.normalize, cu_seqlens=case.cu_seqlens(), backend="recurrent")
    gradients = torch.autograd.grad((out * inputs["w"]).sum(), list(variables.values()))
    return out.detach(), dict(zip(variables, gradients, strict=True))


@slow_unless(lambda **_: False, world_size=(2, 3), gate=GATES, layout=LAYOUTS)
def test_equals_one_device(world_size: int, gate: str, layout: str) -> None:
    check(cases(gate), world_size, LINEAR_STRATEGIES_OF[gate], layout)


def test_packed_documents_equal_one_device() -> None:
    check(cases("scalar")[2:3], 2, "lasp2", "zigzag")


def check(all_cases: list[Case], world_size: int, strategy: str, layout: str) -> None:
    by_rank = run_distributed(run_cases, world_size, all_cases, strategy, layout)
    for i, case in enumerate(all_cases):
        out, gradients = complete_run(case)
        got = join([by_rank[r][i][0] for r in range(world_size)], layout)
        assert np.isfinite(got).all(), case
        assert relative_error(got[:, : case.tokens], out) < 1e-5, case
        for name, expected in gradients.items():
            parts = [by_rank[r][i][1][name] for r in range(world_size)]
            gradient = sum(parts) if expected.ndim == 1 else join(parts, layout)[:, : case.tokens]
            assert relative_error(gradient, expected) < (1e-4 if name == "log_decay" else 1e-5), (name, case)


@pytest.mark.parametrize("fades", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_one_launch_folds_what_was_gathered(fades: bool, reverse: bool) -> None:
    """The kernel that lasp2 uses on a GPU, for every rank of a zigzag chain, bit by bit."""
    ranks, links = 3, 2
    chain = [(r, 0) for r in range(ranks)] + [(r, 1) for r in reversed(range(ranks))]
    gathered = torch.randn(ranks, links, 2, 2, 5, 7 + fades)
    order = chain[::-1] if reverse else chain
    for rank in range(ranks):
        expected = lasp2._fold(gathered, order, rank, 7)
        assert torch.equal(lasp2._fold_in_one_launch(gathered, order, rank, 7), expected)
    assert not expected.eq(0).all()
