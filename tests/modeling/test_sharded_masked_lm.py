"""Bidirectional models on several ranks equal one: logits, loss, every gradient, with padding and documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from linear_llama3.sequence_parallel import (
    LAYOUTS,
    SequenceParallelConfig,
    SequenceParallelContext,
    enable_sequence_parallel,
    unshard,
)
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed
from tests.helpers.sharded import Result, assert_sharded_equals
from tests.helpers.tiny import BIDIRECTIONAL_MIXERS, gradients, tiny_masked_lm, tokens

LENGTH, ROWS = 13, 2


def batch(kind: str) -> dict[str, torch.Tensor]:
    x = tokens(ROWS, LENGTH)
    labels = torch.full_like(x, -100)
    labels[0, 0], labels[0, 5], labels[1, 2:4] = x[0, 0], x[0, 5], x[1, 2:4]  # nothing is shifted: the first counts
    inputs = {"input_ids": x.masked_fill(labels != -100, 3), "labels": labels}
    if kind == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(6), torch.arange(1), torch.arange(6)])[None].expand(ROWS, -1)
    elif kind == "padded":
        inputs["attention_mask"] = torch.ones_like(x)
        inputs["attention_mask"][1, 4:] = 0
    return inputs


def run(mixer: str, kind: str, config: SequenceParallelConfig | None, interval: int = 2) -> Result:
    """Return logits of tokens that are not padding, loss and gradients; with a config, those of the group."""
    model = tiny_masked_lm(mixer, full_attention_interval=interval).double().train()
    inputs: dict[str, Any] = batch(kind)
    count = (inputs["labels"] != -100).sum()
    shown = inputs.get("attention_mask", torch.ones(ROWS, LENGTH)).bool()
    if config is None:
        out = model(**inputs, num_items_in_batch=count)
        out.loss.backward()
        return out.logits[shown].detach().numpy(), out.loss.item(), {k: g.numpy() for k, g in gradients(model).items()}
    context = SequenceParallelContext(dist.group.WORLD, config)
    enable_sequence_parallel(model, context)
    out = model(**context.shard_batch(inputs), num_items_in_batch=count)
    out.loss.backward()
    total = LENGTH if len(out.logits) == ROWS else ROWS * LENGTH  # rows of documents are concatenated
    logits = unshard(out.logits.detach(), group=context.group, length=total, layout=context.layout)
    summed = {"loss": out.loss.detach(), **gradients(model)}
    for value in summed.values():
        dist.all_reduce(value)
    loss = summed.pop("loss").item()
    return logits.reshape(ROWS, LENGTH, -1)[shown].numpy(), loss, {name: g.numpy() for name, g in summed.items()}


@pytest.mark.parametrize("kind", ["rows", "packed", "padded"])
@pytest.mark.parametrize("mixer", BIDIRECTIONAL_MIXERS)
def test_sharded_equals_one_device(mixer: str, kind: str) -> None:
    assert_sharded_equals(run_distributed(run, 3, mixer, kind, SequenceParallelConfig()), run(mixer, kind, None))


@slow_unless(
    lambda strategies, kind, layout: kind == "padded",
    strategies=["lasp1 ring", "all_scan token_ring", "all_to_all rsa", "lasp2 ulysses"],
    kind=["rows", "padded"],
    layout=LAYOUTS,
)
def test_every_strategy_equals_one_device(strategies: str, kind: str, layout: str) -> None:
    linear, softmax = strategies.split()
    config = SequenceParallelConfig(linear=linear, softmax=softmax, layout=layout)
    assert_sharded_equals(run_distributed(run, 2, "based", kind, config), run("based", kind, None))


def test_a_purely_linear_model_equals_one_device() -> None:
    assert_sharded_equals(
        run_distributed(run, 2, "basic", "padded", SequenceParallelConfig(), 0), run("basic", "padded", None, 0)
    )


def left_out() -> list[str]:
    """Return the errors for a loss without a count and for padded documents."""
    model, context = tiny_masked_lm(), SequenceParallelContext(dist.group.WORLD)
    enable_sequence_parallel(model, context)
    said = []
    padded = batch("padded")
    for attempt in (
        lambda: model(**context.shard_batch(batch("rows"))),
        lambda: context.shard_batch({**padded, "cu_seq_lens_q": torch.tensor([0, 13, 26])}),
    ):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_loss_without_a_count_and_padded_documents_are_refused() -> None:
    for said in run_distributed(left_out, 2):
        assert "needs num_items_in_batch" in said[0] and "packed rows must not contain padding" in said[1]
