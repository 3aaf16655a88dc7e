"""The choices of `strategy="auto"` and `layout="auto"`, and their log."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from linear_llama3.sequence_parallel import (
    SequenceParallelConfig,
    SequenceParallelContext,
    enable_sequence_parallel,
    linear_attention,
    shard,
    softmax_attention,
)
from linear_llama3.sequence_parallel.costs import GATHERED_LIMIT, Sizes, choose_linear, choose_softmax, linear_costs
from tests.helpers.attention_cases import Case, on_all_ranks
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import tiny_model, tokens

LLAMA_8B = Sizes(
    batch=1, tokens=8192, q_heads=32, kv_heads=8, key_dim=128, value_dim=128, element=2, ranks=8, chunks_per_rank=2
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ranks": 2}, "lasp2"),
        ({"ranks": 4, "chunks_per_rank": 1}, "lasp2"),
        ({"ranks": 8}, "all_to_all"),
        ({"ranks": 64, "nodes": 8}, "all_to_all"),
        ({"ranks": 2, "batch": 64, "nodes": 2, "chunks_per_rank": 1}, "lasp1"),
    ],
)
def test_linear_layers(change: dict[str, Any], expected: str) -> None:
    sizes = replace(LLAMA_8B, **change)
    costs = linear_costs(sizes)
    assert choose_linear(sizes, log=False) == expected
    assert costs[expected].seconds == min(cost.seconds for cost in costs.values())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "ulysses"),
        ({"ranks": 3}, "lasp2h"),  # 32 heads do not divide
        ({"ranks": 3, "tokens": 2**21}, "ring"),  # too much to gather
        ({"ranks": 3, "kv_heads": 32}, "token_ring"),  # keys weigh as much as queries
        ({"ranks": 3, "kv_heads": 32, "nodes": 3}, "lasp2h"),
    ],
)
def test_softmax_layers(change: dict[str, Any], expected: str) -> None:
    assert choose_softmax(replace(LLAMA_8B, **change), log=False) == expected


def test_the_choice_and_its_reasons_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    sizes = replace(LLAMA_8B, ranks=3, tokens=2**21 + 6)
    with caplog.at_level(logging.INFO, "linear_llama3"):
        choose_softmax(sizes, log=True)
        choose_softmax(sizes, log=True)
    (record,) = caplog.records  # once
    assert "softmax layers use ring" in record.message and "not lasp2h: it would gather" in record.message
    assert "not rsa: its scores" in record.message
    assert "H_q > 2 H_kv" in record.message and GATHERED_LIMIT == 8 * 2**30


def auto_runs() -> tuple[float, float]:
    case, where = Case(tokens=21, gate="scalar", groups=2), on_all_ranks("zigzag")
    local: dict[str, Any] = {n: shard(x, **where) for n, x in case.inputs().items() if n != "w"}
    gate = local.pop("log_decay")
    linear = [linear_attention(**local, log_decay=gate, length=21, strategy=s, **where) for s in ("auto", "all_to_all")]
    softmax = [softmax_attention(**local, length=21, strategy=s, **where) for s in ("auto", "lasp2h")]
    return (linear[0] - linear[1]).abs().max().item(), (softmax[0] - softmax[1]).abs().max().item()


def test_auto_is_one_of_the_strategies() -> None:
    for linear, softmax in run_distributed(auto_runs, 2):
        assert linear == 0 and softmax < 1e-12


def layouts() -> list[str]:
    """Return what "auto" becomes: for a linear model, a hybrid, a context read before, and one that has sharded."""
    found = []
    for kind in ("linear_attention", "full_attention"):
        context = SequenceParallelContext(dist.group.WORLD)
        enable_sequence_parallel(
            tiny_model("basic", num_hidden_layers=2, layer_types=["linear_attention", kind]), context
        )
        found.append(context.layout)
        assert context.layout != "auto"
    read = SequenceParallelContext(dist.group.WORLD)
    assert read.layout == "auto"  # nothing is settled by reading it
    with pytest.raises(ValueError, match=r"layout must be one of .*got 'auto'"):
        shard(tokens(1, 9), group=dist.group.WORLD, layout=read.layout)
    enable_sequence_parallel(tiny_model("basic"), read)
    found.append(read.layout)
    early = SequenceParallelContext(dist.group.WORLD, SequenceParallelConfig(linear="auto", softmax="auto"))
    early.shard_batch({"input_ids": tokens(1, 9)})
    enable_sequence_parallel(tiny_model("basic"), early)
    return [*found, early.layout]


def test_layout_by_the_model() -> None:
    assert run_distributed(layouts, 2) == [["contiguous", "zigzag", "zigzag", "contiguous"]] * 2


def other_layout() -> str:
    """A batch that was cut otherwise than the model expects."""
    model, context = tiny_model("basic"), SequenceParallelContext(dist.group.WORLD)
    enable_sequence_parallel(model, context)
    local = SequenceParallelContext(dist.group.WORLD).shard_batch({"input_ids": tokens(1, 16)})
    if context.rank == 3:  # its tokens follow one another in both layouts: it would wait for the others
        return ""
    try:
        with torch.no_grad():
            model(**local)
    except ValueError as error:
        return str(error)
    return ""


def test_a_batch_of_another_layout_is_refused() -> None:
    assert all("those of layout 'zigzag'" in message for message in run_distributed(other_layout, 4)[:3])
