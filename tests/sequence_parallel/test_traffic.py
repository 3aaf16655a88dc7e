"""Bytes on the wire, counted below torch.distributed, against the formulas of the cost model."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from linear_llama3.sequence_parallel import LAYOUTS, LINEAR_STRATEGIES, SOFTMAX_STRATEGIES, shard
from linear_llama3.sequence_parallel import linear_attention as sharded_linear
from linear_llama3.sequence_parallel import softmax_attention as sharded_softmax
from linear_llama3.sequence_parallel.costs import Sizes, linear_costs, softmax_costs
from scripts.traffic import Traffic
from tests.helpers.attention_cases import on_all_ranks
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed

STRATEGIES = [*LINEAR_STRATEGIES, *SOFTMAX_STRATEGIES]
Counted = tuple[float, float, Counter[str]]
LINEAR: dict[str, Any] = {"batch": 2, "q_heads": 8, "kv_heads": 4, "key_dim": 6, "value_dim": 5}
SOFTMAX: dict[str, Any] = {"batch": 2, "q_heads": 16, "kv_heads": 8, "key_dim": 8, "value_dim": 8}


def count(strategy: str, layout: str, tokens: int, gate: bool, dtype: torch.dtype) -> Counted:
    """Bytes this rank sends forward and backward, and its messages."""
    linear, where = strategy in LINEAR_STRATEGIES, on_all_ranks(layout)
    s = LINEAR if linear else SOFTMAX
    shapes = {"q": ("q_heads", "key_dim"), "k": ("kv_heads", "key_dim"), "v": ("kv_heads", "value_dim")}
    complete = {n: torch.rand(s["batch"], tokens, *(s[x] for x in shape)) for n, shape in shapes.items()}
    if gate:
        complete["log_decay"] = -torch.rand(s["batch"], tokens, s["kv_heads"])
    local: dict[str, Any] = {n: shard(x, **where).to(dtype).requires_grad_() for n, x in complete.items()}
    with Traffic() as forward:
        op = sharded_linear if linear else sharded_softmax
        out = op(**local, strategy=strategy, length=tokens, **where)
    with Traffic() as backward:
        out.sum().backward()
    return forward.bytes, backward.bytes, forward.messages + backward.messages


@slow_unless(
    lambda ranks, strategy, layout, dtype: ranks == 4 and (layout == "zigzag") == (dtype == torch.bfloat16),
    ranks=(2, 4), strategy=STRATEGIES, layout=LAYOUTS, dtype=(torch.float32, torch.bfloat16),
)  # fmt: skip
def test_bytes_are_those_of_the_cost_model(ranks: int, strategy: str, layout: str, dtype: torch.dtype) -> None:
    linear = strategy in LINEAR_STRATEGIES
    for gate in (False, True) if linear else (False,):
        sizes = Sizes(
            **(LINEAR if linear else SOFTMAX),
            tokens=64 // ranks,
            element=dtype.itemsize,
            ranks=ranks,
            chunks_per_rank=LAYOUTS[layout].chunks_per_rank,
            decays=gate,
        )
        theory = (linear_costs if linear else softmax_costs)(sizes)[strategy]
        counted = run_distributed(count, ranks, strategy, layout, 64, gate, dtype)
        assert sum(c[0] for c in counted) / ranks == pytest.approx(theory.forward)
        assert sum(c[1] for c in counted) / ranks == pytest.approx(theory.backward)


MESSAGES = {  # of the rank that sends most, forward and backward together, W = 4, zigzag; All-Scan in one block
    "lasp1": Counter(send=4),
    "lasp2": Counter(all_gather=2),
    "all_scan": Counter(send=4),
    "all_to_all": Counter(all_to_all=4),
    "lasp2h": Counter(all_gather=1, reduce_scatter=1),
    "ring": Counter(send=3 + 3 + 5),  # K and V twice; their gradients, of which halves go home from different ranks
    "token_ring": Counter(send=(3 + 3) + (2 * 3 + 3)),  # queries and results; bundles of two dtypes and results
    "rsa": Counter(send=4 * 3, reduce_scatter=1),
    "ulysses": Counter(all_to_all=4),
}


@pytest.mark.parametrize("strategy", [*LINEAR_STRATEGIES, *SOFTMAX_STRATEGIES])
def test_number_of_messages(strategy: str) -> None:
    counted = run_distributed(count, 4, strategy, "zigzag", 64, False, torch.float32)
    assert max((c[2] for c in counted), key=lambda messages: messages.total()) == MESSAGES[strategy]


@slow_unless(lambda strategy: strategy == "lasp2", strategy=LINEAR_STRATEGIES)
def test_linear_layers_send_the_same_at_every_length(strategy: str) -> None:
    short, long = (run_distributed(count, 4, strategy, "zigzag", t, True, torch.float32) for t in (16, 256))
    assert short == long


@slow_unless(lambda strategy: strategy == "all_to_all", strategy=("lasp1", "all_scan", "all_to_all"))
def test_bytes_that_do_not_grow_with_the_ranks(strategy: str) -> None:
    """At most one state (all-to-all: two, and the decay), while LASP-2 sends W - 1."""
    few, many = (
        max(c[0] for c in run_distributed(count, ranks, strategy, "contiguous", 64, True, torch.float32))
        for ranks in (2, 8)
    )
    state = LINEAR["batch"] * LINEAR["kv_heads"] * LINEAR["key_dim"] * LINEAR["value_dim"] * 4
    assert few <= many <= state * (1 if strategy != "all_to_all" else 2 + 1 / LINEAR["value_dim"])
    sizes = Sizes(**LINEAR, tokens=8, element=4, ranks=8)
    assert linear_costs(sizes)["lasp2"].forward == 7 * state
    assert linear_costs(replace(sizes, ranks=64))["all_to_all"].forward < 2 * state


def one_rank(strategy: str) -> Counter[str]:
    return count(strategy, "zigzag", 16, False, torch.float32)[2]


@pytest.mark.parametrize("strategy", [*LINEAR_STRATEGIES, *SOFTMAX_STRATEGIES])
def test_one_rank_sends_nothing(strategy: str) -> None:
    assert run_distributed(one_rank, 1, strategy) == [Counter()]


def checkpointed(strategy: str, reentrant: bool) -> tuple[Traffic, bool]:
    """Return what this rank sends under gradient checkpointing, and if out and gradients equal those without it."""
    linear, where = strategy in LINEAR_STRATEGIES, on_all_ranks("zigzag")
    op, sizes = (sharded_linear, LINEAR) if linear else (sharded_softmax, SOFTMAX)
    heads = {"q": ("q_heads", "key_dim"), "k": ("kv_heads", "key_dim"), "v": ("kv_heads", "value_dim")}
    complete = [torch.rand(sizes["batch"], 61, *(sizes[x] for x in shape)) for shape in heads.values()]
    local = [shard(x, **where).requires_grad_() for x in complete]
    runs, traffic = [], Traffic()
    for checkpointing in (False, True):
        attention = partial(op, strategy=strategy, length=61, exchange_cache={} if checkpointing else None, **where)
        with traffic if checkpointing else nullcontext():
            out = checkpoint(attention, *local, use_reentrant=reentrant) if checkpointing else attention(*local)
            out.square().sum().backward()
        runs.append([out, *(x.grad for x in local)])
        for x in local:
            x.grad = None
    return traffic, all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@slow_unless(
    lambda strategy, reentrant: not reentrant,
    strategy=[*LINEAR_STRATEGIES, *SOFTMAX_STRATEGIES],
    reentrant=(False, True),
)
def test_recomputation_repeats_no_exchange(strategy: str, reentrant: bool) -> None:
    """Except K and V of LASP-2H, which would take the memory of the complete sequence in every layer, and RSA."""
    repeated = {"lasp2h": Counter(all_gather=1), "rsa": Counter(send=2 * 3)}.get(strategy, Counter())
    results = run_distributed(checkpointed, 4, strategy, reentrant)
    assert all(same for _, same in results)
    most = max((sent.messages for sent, _ in results), key=lambda messages: messages.total())
    assert most == MESSAGES[strategy] + repeated
    if repeated:
        sizes = Sizes(**SOFTMAX, tokens=16, element=4, ranks=4, chunks_per_rank=2)
        theory = softmax_costs(replace(sizes, recomputed=True))[strategy]
        sent = sum(sent.bytes for sent, _ in results) / 4  # RSA sends no padding
        assert sent == pytest.approx(theory.forward + theory.backward, rel=0.04)
        assert theory.backward_seconds > softmax_costs(sizes)[strategy].backward_seconds
