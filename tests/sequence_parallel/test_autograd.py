"""Sharded attention in autograd: autocast, second derivatives, two models at once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from linear_llama3.sequence_parallel import (
    LINEAR_STRATEGIES,
    SOFTMAX_STRATEGIES,
    SequenceParallelConfig,
    SequenceParallelContext,
    enable_sequence_parallel,
    linear_attention,
    shard,
    softmax_attention,
)
from tests.helpers.attention_cases import on_all_ranks
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed, strided_group
from tests.helpers.tiny import gradients, tiny_model, tokens

STRATEGIES = [*LINEAR_STRATEGIES, *SOFTMAX_STRATEGIES]


def attend(strategy: str, autocast: bool = False) -> list[Tensor]:
    """out and gradients, also of the backward pass under autocast."""
    generator = torch.Generator().manual_seed(0)
    where = on_all_ranks("zigzag")
    q, k, v = (shard(torch.randn(1, 24, 4, 8, generator=generator), **where).requires_grad_() for _ in range(3))
    op = linear_attention if strategy in LINEAR_STRATEGIES else softmax_attention
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = op(q, k, v, strategy=strategy, length=24, **where)
        return [out, *torch.autograd.grad(out.square().sum(), [q, k, v], create_graph=True)]


def autocast_changes(strategy: str) -> float:
    pairs = zip(attend(strategy), attend(strategy, autocast=True), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast_changes_nothing(strategy: str) -> None:
    assert run_distributed(autocast_changes, 2, strategy) == [0.0, 0.0]


def second_derivative(strategy: str) -> str:
    _, d_q, *_ = attend(strategy)
    try:
        d_q.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "differentiated twice"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_derivatives_are_refused(strategy: str) -> None:
    """They would be wrong: what the other ranks contribute is not in the graph."""
    for message in run_distributed(second_derivative, 2, strategy):
        assert "once_differentiable" in message


def interleaved(softmax: str) -> float:
    """Two models on different groups with different documents; backward passes in the other order than forward."""
    groups = [dist.group.WORLD, strided_group()]
    documents = [[3, 21], [10, 10, 4]]
    models = [tiny_model("gla", seed=seed).double() for seed in range(2)]
    complete = []
    for model, lengths in zip(models, documents, strict=True):
        model(**batch(lengths), num_items_in_batch=24).loss.backward()
        complete.append({name: g.clone() for name, g in gradients(model).items()})
        model.zero_grad()
    losses = []
    for model, group, lengths in zip(models, groups, documents, strict=True):
        context = SequenceParallelContext(group, SequenceParallelConfig(softmax=softmax))
        enable_sequence_parallel(model, context)
        losses.append(model(**context.shard_batch(batch(lengths)), num_items_in_batch=24).loss)
    for loss in reversed(losses):
        loss.backward()
    worst = 0.0
    for model, group, expected in zip(models, groups, complete, strict=True):
        for name, gradient in gradients(model).items():
            dist.all_reduce(gradient, group=group)
            worst = max(worst, ((gradient - expected[name]).abs().max() / expected[name].abs().max()).item())
    return worst


def batch(lengths: list[int]) -> dict[str, Tensor]:
    x = tokens(1, 24)
    return {"input_ids": x, "labels": x, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


@slow_unless(lambda softmax: softmax == "ring", softmax=("lasp2h", "ring", "token_ring"))
def test_two_models_at_once(softmax: str) -> None:
    assert max(run_distributed(interleaved, 4, softmax)) < 1e-4  # transformers' norms are float32
