"""Sharded linear attention against the recurrence on one device: outputs and every gradient, float64, gloo."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from linear_llama3.ops import chunks
from linear_llama3.ops import linear_attention as one_device
from linear_llama3.ops.block_products import BlockInputs
from linear_llama3.sequence_parallel import (
    LAYOUTS,
    LINEAR_STRATEGIES,
    collectives,
    costs,
    linear_attention,
    shard,
    softmax_attention,
    start_linear_attention,
)
from tests.helpers.attention_cases import GATES, Case, join, leaves, on_all_ranks, relative_error, shards
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed, strided_group

WORLD_SIZES = (1, 2, 3, 4, 8)
Result = dict[str, np.ndarray]


def documents_of(tokens: int) -> tuple[int, ...]:
    """One-token documents, documents inside a rank, on its edges, and over several ranks."""
    return tuple(sorted({0, 1, 2, tokens // 4, tokens // 4 + 1, tokens // 2, tokens - 1, tokens}))


def cases(gate: str) -> list[Case]:
    plain = [Case(tokens=t, gate=gate, batch=2, groups=2) for t in (3, 24, 37)]
    packed = [Case(tokens=t, gate=gate, documents=documents_of(t), groups=3) for t in (8, 24, 37)]
    normal = [
        Case(tokens=37, gate=gate, normalize=True),
        Case(tokens=29, gate=gate, normalize=True, documents=(0, 5, 29)),
    ]
    strong = [Case(tokens=40, gate=gate, strength=30.0, documents=(0, 17, 40))] if gate != "none" else []
    both_ways = (
        [
            Case(tokens=t, causal=False, batch=b, groups=2, normalize=n, documents=d)
            for t, b, n, d in (
                (3, 2, False, None),
                (37, 2, True, None),
                (37, 1, False, documents_of(37)),
                (24, 1, True, (0, 20, 24)),
                (24, 1, False, (0, 3, 6, 24)),
            )
        ]
        if gate == "none"
        else []
    )
    return plain + packed + normal + strong + both_ways


def sharded_run(
    case: Case, strategy: str, layout: str = "contiguous", backend: str = "auto"
) -> tuple[np.ndarray, Result]:
    """One rank's output `[B, C, H_q, D_v]` and gradients of its shards."""
    local = shards(case.inputs(), layout=layout)
    variables = leaves(local)
    out = linear_attention(
        variables["q"],
        variables["k"],
        variables["v"],
        group=dist.group.WORLD,
        strategy=strategy,
        layout=layout,
        log_decay=variables.get("log_decay"),
        normalize=case.normalize,
        cu_seqlens=case.cu_seqlens(),
        causal=case.causal,
        length=case.tokens,
        backend=backend,
    )
    gradients = torch.autograd.grad((out * local["w"]).sum(), list(variables.values()))
    return out.detach().numpy(), {name: g.numpy() for name, g in zip(variables, gradients, strict=True)}


def complete_run(case: Case) -> tuple[np.ndarray, Result]:
    inputs = case.inputs()
    variables = leaves(inputs)
    out, _ = one_device(
        **variables,
        normalize=case.normalize,
        cu_seqlens=case.cu_seqlens(),
        causal=case.causal,
        backend="recurrent",
    )
    gradients = torch.autograd.grad((out * inputs["w"]).sum(), list(variables.values()))
    return out.detach().numpy(), {name: g.numpy() for name, g in zip(variables, gradients, strict=True)}


@patch.object(costs, "LATENCY_BYTES", 1)  # All-Scan: a block for every row of the state
def run_cases(all_cases: list[Case], strategy: str, layout: str) -> list[tuple[np.ndarray, Result]]:
    return [sharded_run(case, strategy, layout) for case in all_cases]


@functools.cache
def expectation(case: Case) -> tuple[np.ndarray, Result]:
    return complete_run(case)


def every_contract(world_size: int, gate: str, strategy: str, layout: str) -> bool:
    """LASP-2 for every gate and layout, and for every W; the other strategies at W = 3. They all agree bit by bit."""
    if strategy == "lasp2":
        return world_size == 3 or (gate == "channel" and layout == "zigzag")
    return world_size == 3 and (gate == "channel" or (gate == "none" and layout == "zigzag"))


@slow_unless(every_contract, world_size=WORLD_SIZES, gate=GATES, strategy=LINEAR_STRATEGIES, layout=LAYOUTS)
def test_equals_one_device(world_size: int, gate: str, strategy: str, layout: str) -> None:
    """`[B, C, H, D]` on W ranks is `[B, T, H, D]` on one, padding holding nan."""
    all_cases = cases(gate)
    by_rank = run_distributed(run_cases, world_size, all_cases, strategy, layout)
    for i, case in enumerate(all_cases):
        expected, expected_gradients = expectation(case)
        out = join([by_rank[r][i][0] for r in range(world_size)], layout)
        assert np.isfinite(out).all(), case
        assert np.abs(out[:, : case.tokens] - expected).max() < 1e-10, case
        for name, reference in expected_gradients.items():
            parts = [by_rank[r][i][1][name] for r in range(world_size)]
            gradient = sum(parts) if reference.ndim == 1 else join(parts, layout)[:, : case.tokens]
            if case.strength == 1.0:  # a strong decay has hardly a gradient
                assert np.abs(reference).max() > 1e-6, f"{name} has no gradient to compare in {case}"
            assert np.abs(gradient - reference).max() < 1e-10, (name, case)


@patch.object(chunks, "MOST_TOKENS", 32)
@patch.object(chunks, "FEWEST_TOKENS", 32)
def run_in_small_blocks(case: Case) -> tuple[np.ndarray, Result]:
    return sharded_run(case, "lasp2", "zigzag")


def test_several_blocks_on_a_rank_equal_one_device() -> None:
    """The chunks of a rank that fill several blocks, forward and backward."""
    case = Case(tokens=200, gate="channel", strength=0.1, groups=2, documents=(0, 30, 200))
    by_rank = run_distributed(run_in_small_blocks, 2, case)
    out, gradients = expectation(case)
    assert np.abs(join([r[0] for r in by_rank], "zigzag") - out).max() < 1e-10
    for name, reference in gradients.items():
        assert np.abs(join([r[1][name] for r in by_rank], "zigzag") - reference).max() < 1e-10, name


def all_strategies(layout: str, latency_bytes: int) -> list[tuple[np.ndarray, Result]]:
    """Every strategy on one case in float32; All-Scan with one block per row, or fewer."""
    case = Case(tokens=37, gate="channel", documents=(0, 5, 29, 37), groups=2, dtype=torch.float32)
    with patch.object(costs, "LATENCY_BYTES", latency_bytes):
        assert costs.number_of_blocks(120, rows=5, hops=3) == (5 if latency_bytes == 1 else 2)
        return [sharded_run(case, strategy, layout) for strategy in LINEAR_STRATEGIES]


@slow_unless(
    lambda world_size, latency_bytes, layout: world_size == 3 and (layout == "zigzag" or latency_bytes == 1),
    world_size=(2, 3, 4), latency_bytes=(1, 50), layout=LAYOUTS,
)  # fmt: skip
def test_strategies_agree_bit_by_bit(world_size: int, layout: str, latency_bytes: int) -> None:
    for (out, gradients), *others in run_distributed(all_strategies, world_size, layout, latency_bytes):
        for other, other_gradients in others:
            assert np.array_equal(out, other)
            for name, gradient in gradients.items():
                assert np.array_equal(gradient, other_gradients[name]), name


def recompute_twice() -> tuple[int, float]:
    """A forward and its recomputation with one exchange_cache, as under gradient checkpointing."""
    local = leaves(shards(Case(tokens=24, gate="channel").inputs()))
    cache: dict[str, Tensor] = {}
    with patch.object(collectives, "_all_gather", wraps=collectives._all_gather) as gather:
        outs = [linear_attention(**local, group=dist.group.WORLD, exchange_cache=cache) for _ in range(2)]
    return gather.call_count, (outs[0] - outs[1]).abs().max().item()


def test_recomputation_does_not_gather_again() -> None:
    for gathers, difference in run_distributed(recompute_twice, 3):
        assert gathers == 1
        assert difference == 0.0


def answered_late(strategy: str, layout: str) -> list[float]:
    """Return errors of attentions started before others get their queries, and after one that never gets any."""
    case, where = Case(tokens=24, gate="channel"), on_all_ranks(layout)
    local = shards(case.inputs(), layout=layout)
    del local["w"]  # the weights of the loss
    expected = linear_attention(**local, strategy=strategy, **where)
    q, k, v = (local.pop(name) for name in "qkv")
    softmax = softmax_attention(q, k, v, strategy="ring", **where)

    def start(k: Tensor) -> Callable[[Tensor], Tensor]:
        return start_linear_attention(k, v, strategy=strategy, **where, **local)

    start(k)  # never gets its queries, as after an error
    first, second = start(k), start(2 * k)
    outs = [(second(q), 2 * expected), (first(q), expected)]
    third = start(k)
    outs += [(softmax_attention(q, k, v, strategy="ring", **where), softmax), (third(q), expected)]
    return [(out - right).abs().max().item() for out, right in outs]


@slow_unless(lambda strategy, layout: layout == "zigzag", strategy=LINEAR_STRATEGIES, layout=LAYOUTS)
def test_queries_may_come_late_or_never(strategy: str, layout: str) -> None:
    for errors in run_distributed(answered_late, 4, strategy, layout):
        assert max(errors) < 1e-10, errors


def strided_groups(strategy: str) -> float:
    """Ranks (0, 2) and (1, 3) shard two different sequences."""
    case, group = Case(tokens=20 + dist.get_rank() % 2, gate="scalar"), strided_group()
    local = leaves(shards(case.inputs(), group=group))
    out = linear_attention(**local, group=group, length=case.tokens, strategy=strategy)
    expected = shard(torch.from_numpy(complete_run(case)[0]), group=group)
    return (out - expected).abs().max().item()


@slow_unless(lambda strategy: strategy in ("lasp1", "lasp2"), strategy=LINEAR_STRATEGIES)
def test_groups_need_not_be_consecutive(strategy: str) -> None:
    assert max(run_distributed(strided_groups, 4, strategy)) < 1e-10


def order_of_events(strategy: str) -> list[str]:
    """Record a forward and backward pass: the start of the scan, intra-chunk products, waiting."""
    events: list[str] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return function(*args, **kwargs)

        return call

    start = recorded("start", LINEAR_STRATEGIES[strategy])
    with (
        patch.dict(LINEAR_STRATEGIES, {strategy: lambda *args, **kwargs: recorded("wait", start(*args, **kwargs))}),
        patch.object(collectives, "_all_gather", recorded("all-gather", collectives._all_gather)),
        patch.object(BlockInputs, "intra_chunk", recorded("intra-chunk", BlockInputs.intra_chunk)),
        patch.object(BlockInputs, "intra_chunk_backward", recorded("intra-chunk", BlockInputs.intra_chunk_backward)),
    ):
        sharded_run(Case(tokens=24, gate="scalar"), strategy)
    return events


@pytest.mark.parametrize("strategy", LINEAR_STRATEGIES)
def test_states_travel_during_the_intra_chunk_products(strategy: str) -> None:
    one_pass = ["start", *(["all-gather"] if strategy == "lasp2" else []), "intra-chunk", "wait"]
    assert run_distributed(order_of_events, 2, strategy) == [one_pass * 2] * 2


NORMALIZED = Case(tokens=2048, normalize=True, key_dim=16, value_dim=16, dtype=torch.bfloat16)
GATED = Case(tokens=300, gate="channel", key_dim=16, value_dim=16, strength=0.1)


def low_precision(case: Case, strategy: str, layout: str) -> np.ndarray:
    where = on_all_ranks(layout)
    local = leaves(shards(case.inputs(), **where))
    out = linear_attention(**local, length=case.tokens, strategy=strategy, normalize=case.normalize, **where)
    return out.detach().float().numpy()


@slow_unless(
    lambda strategy, layout: (strategy, layout) == ("lasp2", "zigzag"), strategy=LINEAR_STRATEGIES, layout=LAYOUTS
)
@pytest.mark.parametrize(
    ("case", "bound"),
    [
        (replace(GATED, dtype=torch.float32), 1e-5),
        (replace(GATED, dtype=torch.bfloat16), 5e-3),
        (replace(GATED, gate="head", tokens=600, dtype=torch.bfloat16), 5e-3),  # bfloat16 counts to 256
        (NORMALIZED, 5e-3),  # a normalizer that is summed in bfloat16 stalls
    ],
    ids=["float32", "bfloat16", "bfloat16 constant decay", "normalized bfloat16"],
)
def test_precision(case: Case, bound: float, strategy: str, layout: str) -> None:
    inputs = {name: x.double() for name, x in case.inputs().items() if name != "w"}
    expected = one_device(**inputs, normalize=case.normalize, backend="recurrent")[0]
    out = join(run_distributed(low_precision, 4, case, strategy, layout), layout)[:, : case.tokens]
    assert relative_error(out, expected) < bound


def saved_elements(strategy: str, layout: str, tokens: int) -> int:
    """Numbers that a forward pass keeps for the backward pass, the inputs left out."""
    case, where = Case(tokens=tokens, gate="scalar"), on_all_ranks(layout)
    local = leaves(shards(case.inputs(), **where))
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.numel()}), lambda x: x):
        linear_attention(**local, length=tokens, strategy=strategy, **where)
    return sum(kept.values()) - sum(x.numel() for x in local.values())


@slow_unless(lambda strategy, layout: strategy == "lasp2", strategy=LINEAR_STRATEGIES, layout=LAYOUTS)
def test_few_states_are_kept(strategy: str, layout: str) -> None:
    """One that enters every chunk of the layout, with that chunk's decay, and one for every 1,024 tokens: neither all
    states of the ranks nor any scores."""
    case, chunks = Case(tokens=1), LAYOUTS[layout].chunks_per_rank
    state, decay = case.heads * case.key_dim * case.value_dim, case.heads * case.key_dim
    for tokens in (256, 2048):
        expected = (chunks + 1) * state + chunks * decay
        assert run_distributed(saved_elements, 4, strategy, layout, tokens) == [expected] * 4
