"""The segments of documents that the Triton kernels scan, and the merge of the states behind them."""

from __future__ import annotations

import gc
import math
import weakref
from itertools import pairwise

import pytest
import torch

from tests.helpers.attention_cases import relative_error

pytest.importorskip("triton")

from linear_llama3.ops.triton import launch, segments
from linear_llama3.ops.triton.merge import CONTINUE, NOTHING, ZERO, MergeStep, merge_steps

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="with a GPU the kernels are compiled"),
    pytest.mark.usefixtures("poison"),
]


def test_merge_is_the_fold() -> None:
    """Against the recurrence written out, with restarts, pieces left out, and rows longer than V (the message of
    another device, whose last column is the decay)."""
    message = torch.randn(4, 2, 3, 5, 8)
    states, decays, initial = message[..., :-1], message[..., -1].sigmoid(), torch.randn(2, 2, 3, 5, 7)
    steps = [
        MergeStep(fold=0, store=0, start=ZERO),
        MergeStep(fold=2, store=1),
        MergeStep(fold=1),
        MergeStep(store=2),
        MergeStep(fold=3, store=3, start=1),
        MergeStep(store=4),
    ]
    expected, x = {}, torch.zeros(2, 3, 5, 7)
    for fold, store, start in steps:
        if start != CONTINUE:
            x = initial[start] if start != ZERO else torch.zeros_like(x)
        if store != NOTHING:
            expected[store] = x
        if fold != NOTHING:
            x = decays[fold].unsqueeze(-1) * x + states[fold]
    got = launch.merge(states, decays, merge_steps(steps, states.device), 5, initial)
    assert got.shape == (2, 5, 3, 5, 7)
    for target, state in expected.items():
        assert torch.equal(got[:, target], state), target


def test_what_is_forgotten_may_be_anything() -> None:
    """0 * nan is nan, but a document that is over has nothing to say."""
    states = torch.full((2, 1, 1, 2, 2), torch.nan)
    states[1] = 1.0
    decays = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 1, 1, 2)
    steps = merge_steps([MergeStep(fold=0, start=ZERO), MergeStep(fold=1), MergeStep(store=0)], states.device)
    assert torch.equal(launch.merge(states, decays, steps, 1)[:, 0], torch.ones(1, 1, 2, 2))


def test_decay_sums_restart_in_every_chunk() -> None:
    log_decay = -torch.rand(2, 150, 3)
    k, v = torch.randn(2, 150, 3, 16), torch.randn(2, 150, 3, 16)
    launcher = launch.Launcher(k, v, log_decay, (0, 70, 150))
    edges = [*range(0, 70, launcher.chunk), *range(70, 150, launcher.chunk), 150]
    for start, stop in pairwise(edges):
        expected = log_decay[:, start:stop].double().cumsum(1) / math.log(2)
        assert launcher.b is not None and relative_error(launcher.b[:, start:stop].double(), expected) < 1e-6


def test_tables_go_with_their_segments() -> None:
    kept = []
    for stop in range(2, 200):
        cut = segments.cut((0, 1, stop), length=128, chunk=64, device=torch.device("cpu"))
        cut.table(None)
        kept.append(weakref.ref(cut))
    del cut
    gc.collect()
    assert sum(x() is not None for x in kept) == segments._cut.cache_info().maxsize
