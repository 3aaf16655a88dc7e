"""Linformer attention on shards against the definition on one device, and why causal models are refused it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from linear_llama3.sequence_parallel import LAYOUTS, linformer_attention
from tests.helpers.attention_cases import join, on_all_ranks, shards
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed

TOKENS, PROJECTED = 37, 4
Result = list[np.ndarray]


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"q": (2, TOKENS, 4, 5), "k": (2, TOKENS, 2, 5), "v": (2, TOKENS, 2, 3)}
    shapes |= {"w": (2, TOKENS, 4, 3), "key_projection": (PROJECTED, TOKENS), "value_projection": (PROJECTED, TOKENS)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def sharded(layout: str) -> Result:
    where = on_all_ranks(layout)
    local = shards(inputs(), **where)
    w = local.pop("w")
    variables = {n: x.requires_grad_() for n, x in local.items()}
    out = linformer_attention(**variables, length=TOKENS, **where)
    return [x.detach().numpy() for x in (out, *torch.autograd.grad((out * w).sum(), list(variables.values())))]


def definition() -> list[Tensor]:
    x = {n: t.requires_grad_() for n, t in inputs().items()}
    k, v = (x[n].repeat_interleave(2, dim=2) for n in "kv")
    keys = torch.einsum("pt,bthd->bphd", x["key_projection"], k)
    values = torch.einsum("pt,bthd->bphd", x["value_projection"], v)
    p = (torch.einsum("bthd,bphd->bthp", x["q"], keys) / 5**0.5).softmax(-1)
    out = torch.einsum("bthp,bphd->bthd", p, values)
    names = ("q", "k", "v", "key_projection", "value_projection")
    return [out.detach(), *torch.autograd.grad((out * x["w"]).sum(), [x[n] for n in names])]


@slow_unless(lambda world_size, layout: world_size == 3, world_size=(1, 2, 3, 4, 8), layout=LAYOUTS)
def test_equals_one_device(world_size: int, layout: str) -> None:
    by_rank = run_distributed(sharded, world_size, layout)
    for i, expected in enumerate(definition()):
        got = join([r[i] for r in by_rank], layout)[:, :TOKENS]
        assert expected.abs().max() > 1e-8
        assert np.abs(got - expected.numpy()).max() < 1e-10


def test_it_shows_the_future() -> None:
    """The reason of the refusal: the last token moves the first output."""
    x = inputs()
    del x["w"]
    before = linformer_attention(**x, group=None)
    x["v"][:, -1] += 1
    assert (linformer_attention(**x, group=None) - before)[:, 0].abs().max() > 0.01
    with pytest.raises(ValueError, match="shows a causal model the future, got causal=True"):
        linformer_attention(**x, group=None, causal=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_projection": torch.zeros(4, 5)}, r"key_projection must be this rank's columns \[p, C = 37\]"),
        ({"value_projection": torch.zeros(3, TOKENS)}, "must have the same number of rows, got 4 and 3"),
    ],
)
def test_projections_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    x = inputs() | change
    x.pop("w")
    with pytest.raises(ValueError, match=message):
        linformer_attention(**x, group=None)
