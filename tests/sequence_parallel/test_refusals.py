"""Refusals of sequence parallelism, by name. docs/sequence_parallelism.md shows the table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from linear_llama3.sequence_parallel import (
    SequenceParallelConfig,
    SequenceParallelContext,
    enable_sequence_parallel,
    linear_attention,
    linformer_attention,
    shard,
    softmax_attention,
)
from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import tiny_model, tokens

RANKS = 3


def qkv(q_heads: int = 6, kv_heads: int = 3, tokens: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.rand(1, tokens, q_heads, 8), torch.rand(1, tokens, kv_heads, 8)
    return q, k, k.clone()


def model_run(*, training: bool = False, batch: dict[str, Tensor] | None = None, **fields: Any) -> None:
    model, context = tiny_model("basic", **fields).train(training), SequenceParallelContext(dist.group.WORLD)
    enable_sequence_parallel(model, context)
    model(**context.shard_batch(batch or {"input_ids": tokens(1, 12)}))


def evaluate(**changes: Any) -> None:
    """Run the Trainer's checks."""
    LinearLlama3Trainer._check_arguments(LinearLlama3TrainingArguments("unused", use_cpu=True, **changes))


def uneven_heads() -> None:
    softmax_attention(*qkv(q_heads=4, kv_heads=2), group=dist.group.WORLD, strategy="ulysses")


def uneven_kv_heads() -> None:
    softmax_attention(*qkv(q_heads=6, kv_heads=2), group=dist.group.WORLD, strategy="ulysses")


def linformer() -> None:
    linformer_attention(*qkv(), torch.rand(2, 4), torch.rand(2, 4), group=dist.group.WORLD, causal=True)


def decay_both_ways() -> None:
    linear_attention(*qkv(), group=dist.group.WORLD, log_decay=-torch.ones(3), causal=False)


def window_both_ways() -> None:
    softmax_attention(*qkv(), group=dist.group.WORLD, sliding_window=2, causal=False)


def recurrent() -> None:
    linear_attention(*qkv(), group=dist.group.WORLD, backend="recurrent")


def half_a_zigzag() -> None:
    softmax_attention(*qkv(tokens=5), group=dist.group.WORLD, layout="zigzag")


def unknown_names() -> None:
    SequenceParallelConfig(softmax="megatron")


def dropout() -> None:
    model_run(training=True, attention_dropout=0.1)


def left_padding() -> None:
    mask = torch.tensor([[0, 0] + [1] * 10])
    model_run(batch={"input_ids": tokens(1, 12), "attention_mask": mask})


def unknown_entry() -> None:
    model_run(batch={"input_ids": tokens(1, 12), "token_type_ids": torch.zeros(1, 12, dtype=torch.long)})


def generation() -> None:
    model = tiny_model("basic")
    enable_sequence_parallel(model, SequenceParallelContext(dist.group.WORLD))
    model(tokens(1, 12), position_ids=torch.arange(12)[None], use_cache=True)


def weights() -> None:
    model_run(output_attentions=True, attn_implementation="eager")


def rope() -> None:
    model_run(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})


def smoothing() -> None:
    evaluate(label_smoothing_factor=0.1)


REFUSED: list[tuple[str, Callable[[], None], str]] = [  # (the words of the table, the attempt, the message)
    ("`ulysses` with H_q not a multiple of W", uneven_heads, "got H_q = 4, H_kv = 2, W = 3; use 'lasp2h' or 'ring'"),
    ("`ulysses` with H_kv neither a multiple nor a divisor of W", uneven_kv_heads, "got H_q = 6, H_kv = 2, W = 3"),
    ("Linformer (`linformer_attention`) in causal models", linformer, "shows a causal model the future"),
    ("a decay without a causal mask", decay_both_ways, "causal=False allows no decay"),
    ("a sliding window without a causal mask", window_both_ways, "needs causal=True, got 2 with causal=False"),
    ('`backend="recurrent"` on several ranks', recurrent, "'recurrent' is defined on one device"),
    ("an odd number of local tokens on the zigzag layout", half_a_zigzag, "2 equal chunks, got 5 local tokens"),
    ("names that are not in the registries", unknown_names, "must be one of .*got 'megatron'"),
    ("dropout within attention", dropout, "attention_dropout must be 0 in sequence-parallel training, got 0.1"),
    ("padding on the left", left_padding, "accepts padding on the right only"),
    ("other batch entries with a value for every token", unknown_entry, "got 'token_type_ids' of shape"),
    ("generation and caches", generation, "there is no cache, got a cache or use_cache=True"),
    ("attention weights as output", weights, "no rank holds the attention weights"),
    ("rotary embeddings that depend on the length (`dynamic`, `longrope`)", rope, "'dynamic' depends on the length"),
    ("label smoothing", smoothing, "label_smoothing_factor must be 0"),
]


def attempt(index: int) -> str:
    try:
        REFUSED[index][1]()
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=[row[0] for row in REFUSED])
def test_refused_by_name(index: int) -> None:
    for message in run_distributed(attempt, RANKS, index):
        assert re.search(REFUSED[index][2], message), message


def test_the_documentation_lists_them() -> None:
    page = (Path(__file__).parents[2] / "docs/sequence_parallelism.md").read_text()
    table = page.split("## Refused under sequence parallelism")[1].split("\n#")[0]
    listed = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert listed[: len(REFUSED)] == [row[0] for row in REFUSED]  # the others are tested with the Trainer and models


@pytest.mark.parametrize("ranks", [2, 4])
def test_refusals_are_no_wider_than_needed(ranks: int) -> None:
    """Cases at the border of the refused ones work."""
    for case in run_distributed(just_fits, ranks):
        assert case == "works"


def just_fits() -> str:
    group, ranks = dist.group.WORLD, dist.get_world_size()
    softmax_attention(*qkv(q_heads=ranks, kv_heads=1), group=group, strategy="ulysses")
    softmax_attention(*qkv(q_heads=2 * ranks, kv_heads=ranks), group=group, strategy="ulysses", sliding_window=2)
    x = torch.rand(1, 5, 2, 8)
    q = shard(x, group=group, layout="zigzag")
    linear_attention(q, q, q, group=group, layout="zigzag", length=5, causal=False)
    linformer_attention(q, q, q, *[torch.rand(2, q.shape[1])] * 2, group=group, layout="zigzag", length=5)
    return "works"


@pytest.mark.parametrize("op", [linear_attention, softmax_attention])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 3.0}, "length must be an integer, .* got 3.0"),
        ({"length": True}, "length must be an integer"),
        ({"cu_seqlens": [0, 4]}, "cu_seqlens must be a 1-D integer tensor .* got a list"),
        ({"cu_seqlens": torch.tensor(4)}, "cu_seqlens must be a 1-D integer tensor"),
        ({"cu_seqlens": torch.tensor([[0, 4]])}, "cu_seqlens must be a 1-D integer tensor"),
    ],
)
def test_what_is_said_of_the_complete_sequence_is_checked(
    op: Callable[..., Tensor], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        op(*qkv(), group=None, **options)
