"""Sharded softmax attention against plain masked softmax on one device: outputs and gradients, float64, gloo."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from linear_llama3.ops import softmax_attention as ops
from linear_llama3.sequence_parallel import LAYOUTS, SOFTMAX_STRATEGIES, shard, softmax_attention
from tests.helpers.attention_cases import join, on_all_ranks, relative_error, shards
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed, strided_group

WORLD_SIZES = (1, 2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Case:
    tokens: int
    batch: int = 1
    groups: int = 1
    documents: tuple[int, ...] | None = None
    window: int | None = None
    causal: bool = True
    value_dim: int = 5
    heads: int = 2  # of keys and values
    broken: int | None = None  # a document whose queries, keys and values are `fault`
    fault: float = np.nan

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.tokens)
        shapes = {
            "q": (self.heads * self.groups, 5),
            "k": (self.heads, 5),
            "v": (self.heads, self.value_dim),
            "w": (self.heads * self.groups, self.value_dim),
        }
        inputs = {
            name: 2 * torch.randn(self.batch, self.tokens, *shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        if self.documents and self.broken is not None:
            for name in "qkv":
                inputs[name][:, slice(*self.documents[self.broken : self.broken + 2])] = self.fault
        return inputs

    def options(self) -> dict[str, Any]:
        edges = None if self.documents is None else torch.tensor(self.documents)
        return {"cu_seqlens": edges, "sliding_window": self.window, "causal": self.causal}


CASES = [
    *(Case(tokens=t, batch=2, groups=2) for t in (1, 3, 24, 37)),
    *(
        Case(tokens=t, groups=2, documents=d)
        for t, d in ((24, (0, 6, 12, 24)), (37, (0, 1, 2, 9, 30, 37)), (40, (0, 39, 40)))
    ),
    *(Case(tokens=37, window=w, groups=4) for w in (1, 4, 10, 13, 50)),
    Case(tokens=37, window=7, documents=(0, 3, 20, 37)),
    Case(tokens=300, window=270, batch=2),  # more rows than one band tile
    Case(tokens=37, value_dim=3, groups=2, documents=(0, 20, 37)),  # D_v != D: without the fused operator
    Case(tokens=30, value_dim=3, window=5),
    Case(tokens=600, value_dim=3, documents=(0, 560, 600)),  # more rows than are scored at once
    *(Case(tokens=t, causal=False, batch=2, groups=2) for t in (3, 37)),
    Case(tokens=37, causal=False, documents=(0, 2, 17, 18, 37)),
]


def plain_softmax(case: Case) -> tuple[Tensor, list[Tensor]]:
    """The definition: all scores, one mask, softmax; gradients by autograd."""
    inputs = case.inputs()
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    keys, values = (x.repeat_interleave(case.groups, dim=2) for x in (k, v))
    position = torch.arange(case.tokens)
    edges = torch.tensor(case.documents or (0, case.tokens))
    document = torch.bucketize(position, edges, right=True)
    distance = position[:, None] - position[None, :]
    visible = document[:, None] == document[None, :]
    if case.causal:
        visible &= distance >= 0
    if case.window is not None:
        visible &= distance < case.window
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) * 5**-0.5
    p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", p, values)
    return out.detach(), list(torch.autograd.grad((out * inputs["w"]).sum(), [q, k, v]))


def sharded_run(case: Case, strategy: str, layout: str = "contiguous") -> list[np.ndarray]:
    """This rank's out, dq, dk, dv."""
    where = on_all_ranks(layout)
    inputs = shards(case.inputs(), **where)
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    out = softmax_attention(q, k, v, strategy=strategy, length=case.tokens, **where, **case.options())
    gradients = torch.autograd.grad((out * inputs["w"]).sum(), [q, k, v])
    return [x.detach().numpy() for x in (out, *gradients)]


def run_cases(strategy: str, layout: str, chosen: list[Case]) -> list[list[np.ndarray]]:
    return [sharded_run(case, strategy, layout) for case in chosen]


def with_enough_heads(world_size: int) -> list[Case]:
    """Ulysses divides heads: cases with a kv head or several for each rank, and with kv heads that ranks share."""
    shared = [h for h in (1, 2) if world_size % h == 0]
    return [replace(case, heads=world_size) for case in CASES] + [
        replace(CASES[i], heads=h, groups=2 * world_size // h) for h in shared for i in (1, 3, 6, 8, -1)
    ]


@functools.cache
def expectation(case: Case) -> tuple[Tensor, list[Tensor]]:
    return plain_softmax(case)


@slow_unless(
    lambda world_size, strategy, layout: world_size == 3 or (strategy, layout) == ("token_ring", "zigzag"),
    world_size=WORLD_SIZES, strategy=SOFTMAX_STRATEGIES, layout=LAYOUTS,
)  # fmt: skip
def test_equals_one_device(world_size: int, strategy: str, layout: str) -> None:
    """`[B, C, H, D]` on W ranks is `[B, T, H, D]` on one, padding holding nan."""
    chosen = CASES if strategy != "ulysses" else with_enough_heads(world_size)
    by_rank = run_distributed(run_cases, world_size, strategy, layout, chosen)
    for i, case in enumerate(chosen):
        out, gradients = expectation(case)
        for j, (name, expected) in enumerate(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True)):
            if case.tokens > 1 and case.window != 1:  # a softmax over one key has no gradient
                assert expected.abs().max() > 1e-8, f"{name} has nothing to compare in {case}"
            got = join([by_rank[r][i][j] for r in range(world_size)], layout)
            assert np.isfinite(got).all(), (name, case)
            assert np.abs(got[:, : case.tokens] - expected.numpy()).max() < 1e-10, (name, case)


@slow_unless(
    lambda strategy, layout, fault: layout == "zigzag" and np.isnan(fault),
    strategy=SOFTMAX_STRATEGIES, layout=LAYOUTS, fault=(np.nan, np.inf),
)  # fmt: skip
def test_a_broken_document_stays_alone(strategy: str, layout: str, fault: float) -> None:
    """A weight of 0 does not keep nan and inf out: 0 * nan is nan."""
    edges = (0, 9, 20, 37)
    chosen = [
        Case(tokens=37, heads=3, documents=edges, broken=1, fault=fault, **options)
        for options in ({}, {"window": 5}, {"causal": False}, {"value_dim": 3})
    ]
    by_rank = run_distributed(run_cases, 3, strategy, layout, chosen)
    for i, case in enumerate(chosen):
        out, gradients = expectation(replace(case, broken=None, fault=0.0))
        for j, expected in enumerate((out, *gradients)):
            got = join([r[i][j] for r in by_rank], layout)[:, :37]
            assert not np.isfinite(got[:, 9:20]).all(), case
            for a, b in ((0, 9), (20, 37)):
                assert np.abs(got[:, a:b] - expected.numpy()[:, a:b]).max() < 1e-10, (j, case)


def visited_keys(strategy: str) -> int:
    """Keys that this rank's kernel calls read in a forward pass over packed documents, T = 32."""
    with patch.object(ops, "attend", wraps=ops.attend) as attend:
        sharded_run(Case(tokens=32, documents=(0, 12, 16, 32)), strategy)
    return sum(k.shape[2] for (_, k, *_), _ in attend.call_args_list)


@pytest.mark.parametrize("strategy", ["lasp2h", "ring"])
def test_attends_only_with_keys_it_sees(strategy: str) -> None:
    # rank 0: [0, 8). rank 1: its [8, 12) after [0, 8), and [12, 16). rank 2: [16, 24). rank 3: [16, 24) and its own.
    assert run_distributed(visited_keys, 4, strategy) == [8, 8 + 4 + 4, 8, 16]


def work_done(layout: str) -> int:
    """Score entries that this rank's kernel calls compute, T = 64, causal."""
    with patch.object(ops, "attend", wraps=ops.attend) as attend:
        sharded_run(Case(tokens=64), "lasp2h", layout)
    entries = 0
    for (q, k, _, tile, _), _ in attend.call_args_list:
        full = q.shape[2] * k.shape[2]
        entries += (full + k.shape[2]) // 2 if tile.causal else full
    return entries


def test_zigzag_balances_causal_work() -> None:
    contiguous, zigzag = (run_distributed(work_done, 4, layout) for layout in ("contiguous", "zigzag"))
    assert sum(contiguous) == sum(zigzag) == 64 * 65 // 2
    assert max(zigzag) == min(zigzag)
    assert max(contiguous) > 1.7 * sum(contiguous) / 4


BFLOAT16 = Case(tokens=200, groups=2, heads=8)


def half_precision(strategy: str, layout: str) -> list[np.ndarray]:
    where = on_all_ranks(layout)
    inputs = {n: x.bfloat16().requires_grad_() for n, x in shards(BFLOAT16.inputs(), **where).items()}
    out = softmax_attention(*(inputs[n] for n in "qkv"), length=BFLOAT16.tokens, strategy=strategy, **where)
    gradients = torch.autograd.grad(out, [inputs[n] for n in "qkv"], inputs["w"])
    assert all(x.dtype == torch.bfloat16 for x in (out, *gradients))
    return [x.detach().float().numpy() for x in (out, *gradients)]


@slow_unless(
    lambda world_size, strategy, layout: world_size == 2 and layout == "zigzag",
    world_size=(2, 8), strategy=SOFTMAX_STRATEGIES, layout=LAYOUTS,
)  # fmt: skip
def test_bfloat16_does_not_drift_with_the_ranks(world_size: int, strategy: str, layout: str) -> None:
    inputs = {n: x.bfloat16().double().requires_grad_() for n, x in BFLOAT16.inputs().items()}
    out = softmax_attention(*(inputs[n] for n in "qkv"), group=None)
    expected = (out, *torch.autograd.grad(out, [inputs[n] for n in "qkv"], inputs["w"]))
    by_rank = run_distributed(half_precision, world_size, strategy, layout)
    for i, (name, reference) in enumerate(zip(("out", "dq", "dk", "dv"), expected, strict=True)):
        got = join([r[i] for r in by_rank], layout)[:, : BFLOAT16.tokens]
        assert relative_error(got, reference) < 5e-3, name


def twice(strategy: str, layout: str) -> bool:
    case = Case(tokens=37, groups=2, heads=3)
    first, second = (sharded_run(case, strategy, layout) for _ in range(2))
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@slow_unless(lambda strategy, layout: layout == "zigzag", strategy=SOFTMAX_STRATEGIES, layout=LAYOUTS)
def test_two_runs_are_bit_equal(strategy: str, layout: str) -> None:
    assert all(run_distributed(twice, 3, strategy, layout))


def strided_groups(strategy: str) -> float:
    """Ranks (0, 2) and (1, 3) shard two different sequences."""
    case = Case(tokens=20 + dist.get_rank() % 2, groups=2)
    where: dict[str, Any] = {"group": strided_group(), "layout": "zigzag"}
    local = shards(case.inputs(), **where)
    out = softmax_attention(*(local[n] for n in "qkv"), length=case.tokens, strategy=strategy, **where)
    return (out - shard(plain_softmax(case)[0], **where)).abs().max().item()


@slow_unless(lambda strategy: strategy in ("lasp2h", "ring"), strategy=SOFTMAX_STRATEGIES)
def test_groups_need_not_be_consecutive(strategy: str) -> None:
    assert max(run_distributed(strided_groups, 4, strategy)) < 1e-10
