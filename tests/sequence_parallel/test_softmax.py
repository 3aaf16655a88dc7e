"""Sharded softmax attention against plain masked softmax on one device: outputs and gradients, float64, gloo."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from linear_llama3.sequence_parallel import LAYOUTS, SOFTMAX_STRATEGIES, shard, softmax_attention
from tests.attention_cases import join
from tests.distributed import run_distributed

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

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.tokens)
        shapes = {
            "q": (self.heads * self.groups, 5),
            "k": (self.heads, 5),
            "v": (self.heads, self.value_dim),
            "w": (self.heads * self.groups, self.value_dim),
        }
        return {
            name: 2 * torch.randn(self.batch, self.tokens, *shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }

    def options(self) -> dict[str, object]:
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
    """This rank's out, dq, dk, dv; the padding of the shards holds nan."""
    where = {"group": dist.group.WORLD, "layout": layout}
    inputs = {n: shard(x, padding=0 if n == "w" else np.nan, **where) for n, x in case.inputs().items()}
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", SOFTMAX_STRATEGIES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equals_one_device(world_size: int, strategy: str, layout: str) -> None:
    """`[B, C, H, D]` on W ranks is `[B, T, H, D]` on one, padding holding nan."""
    chosen = CASES if strategy != "ulysses" else with_enough_heads(world_size)
    by_rank = run_distributed(run_cases, world_size, strategy, layout, chosen)
    for i, case in enumerate(chosen):
        out, gradients = expectation(case)
        for j, (name, expected) in enumerate(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True)):
            got = join([by_rank[r][i][j] for r in range(world_size)], layout)
            assert np.isfinite(got).all(), (name, case)
            assert np.abs(got[:, : case.tokens] - expected.numpy()).max() < 1e-10, (name, case)


def visited_keys() -> list[int]:
    """Keys that this rank's kernel calls read in a forward pass over packed documents, T = 32."""
    from linear_llama3.ops import softmax_attention as ops

    read, original = [], ops.attend

    def spy(q, k, v, tile, scale):
        read.append(k.shape[2])
        return original(q, k, v, tile, scale)

    ops.attend = spy
    try:
        sharded_run(Case(tokens=32, documents=(0, 12, 16, 32)), "lasp2h")
    finally:
        ops.attend = original
    return sum(read)


def test_attends_only_with_keys_it_sees() -> None:
    # rank 0: [0, 8). rank 1: its [8, 12) after [0, 8), and [12, 16). rank 2: [16, 24). rank 3: [16, 24) and its own.
    assert run_distributed(visited_keys, 4) == [8, 8 + 4 + 4, 8, 16]


def half_precision() -> list[np.ndarray]:
    case = Case(tokens=200, groups=4)
    inputs = {n: shard(x, group=dist.group.WORLD).bfloat16() for n, x in case.inputs().items()}
    return [softmax_attention(*(inputs[n] for n in "qkv"), group=dist.group.WORLD).float().numpy()]


def test_bfloat16() -> None:
    case = Case(tokens=200, groups=4)
    q, k, v = (case.inputs()[n].bfloat16().double() for n in "qkv")
    expected = softmax_attention(q, k, v, group=None).numpy()
    out = np.concatenate([r[0] for r in run_distributed(half_precision, 4)], axis=1)
    assert np.linalg.norm(out - expected) / np.linalg.norm(expected) < 5e-3
