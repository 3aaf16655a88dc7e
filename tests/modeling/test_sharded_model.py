"""The model on several ranks equals the model on one: logits, loss and every parameter's gradient, in float64."""

from __future__ import annotations

import copy
import io
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel

from linear_llama3.sequence_parallel import (
    LAYOUTS,
    SequenceParallelConfig,
    SequenceParallelContext,
    enable_sequence_parallel,
    unshard,
)
from scripts.traffic import Traffic
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed
from tests.helpers.sharded import Result, assert_sharded_equals
from tests.helpers.tiny import MIXER_NAMES, gradients, tiny_model, tokens

LENGTH = 37


def batch(rows: int, documents: list[int] | None) -> dict[str, torch.Tensor]:
    x = tokens(rows, LENGTH)
    labels = x.clone()
    labels[:, : LENGTH // 2] = -100  # the first ranks have no labels
    if documents is None:
        return {"input_ids": x, "labels": labels}
    positions = torch.cat([torch.arange(n) for n in documents])[None].expand(rows, -1)
    return {"input_ids": x, "labels": labels, "position_ids": positions}


def run(
    mixer: str,
    rows: int,
    documents: list[int] | None,
    checkpointing: str,
    sharded: bool,
    config: SequenceParallelConfig | None = None,
) -> Result:
    """Return logits `[rows, T, vocab]`, loss and gradients; if sharded, summed over the ranks of the group."""
    model = tiny_model(mixer).double().train()
    if checkpointing != "no":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    inputs: dict[str, Any] = batch(rows, documents)
    count = (inputs["labels"][:, 1:] != -100).sum()
    if not sharded:
        out = model(**inputs, num_items_in_batch=count)
        out.loss.backward()
        return out.logits.detach().numpy(), out.loss.item(), {k: g.numpy() for k, g in gradients(model).items()}
    context = SequenceParallelContext(dist.group.WORLD, config)
    enable_sequence_parallel(model, context)
    out = model(**context.shard_batch(inputs), num_items_in_batch=count)
    out.loss.backward()
    total = LENGTH if documents is None else rows * LENGTH
    logits = unshard(out.logits.detach(), group=context.group, length=total, layout=context.layout)
    summed = {"loss": out.loss.detach(), **gradients(model)}
    for value in summed.values():
        dist.all_reduce(value)
    loss = summed.pop("loss").item()
    return logits.reshape(rows, LENGTH, -1).numpy(), loss, {name: g.numpy() for name, g in summed.items()}


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    ("mixer", "rows", "documents", "checkpointing"),
    [
        *((mixer, 2, None, "no") for mixer in MIXER_NAMES),
        *((mixer, 2, [5, 1, 20, 11], "no") for mixer in MIXER_NAMES),
        ("gla", 1, [5, 1, 20, 11], "reentrant"),
        ("gla", 1, None, "non-reentrant"),
        ("lightning", 1, [5, 1, 20, 11], "non-reentrant"),
    ],
)
def test_sharded_equals_one_device(
    mixer: str, rows: int, documents: list[int] | None, checkpointing: str, world_size: int
) -> None:
    expected = run(mixer, rows, documents, checkpointing, False)
    assert_sharded_equals(run_distributed(run, world_size, mixer, rows, documents, checkpointing, True), expected)


@slow_unless(
    lambda world_size, strategies, packed, layout: world_size == 2 and packed,
    world_size=[2, 4],
    strategies=["lasp1 ring", "all_scan token_ring", "all_to_all rsa", "lasp2 ulysses", "auto auto"],
    packed=[False, True],
    layout=LAYOUTS,
)
def test_every_strategy_equals_one_device(world_size: int, strategies: str, packed: bool, layout: str) -> None:
    """A hybrid of GLA and softmax layers, recomputed in the backward pass."""
    linear, softmax = strategies.split()
    documents = [5, 1, 20, 11] if packed else None
    config = SequenceParallelConfig(linear=linear, softmax=softmax, layout=layout)
    expected = run("gla", 2, documents, "non-reentrant", False)
    assert_sharded_equals(
        run_distributed(run, world_size, "gla", 2, documents, "non-reentrant", True, config), expected
    )


def messages(checkpointing: bool) -> Counter[str]:
    """Count this rank's messages in a forward and backward pass of two linear and two softmax layers."""
    model = tiny_model("gla").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    context = SequenceParallelContext(dist.group.WORLD)
    enable_sequence_parallel(model, context)
    with Traffic() as traffic:
        model(**context.shard_batch(batch(1, None)), num_items_in_batch=1).loss.backward()
    return traffic.messages


def test_checkpointing_repeats_no_exchange_of_states() -> None:
    """LASP-2H gathers K and V again: checkpointing is used to avoid storing those of the complete sequence."""
    for checkpointing, gathers in ((False, 2 * 2 + 2), (True, 2 * 2 + 2 * 2)):
        for sent in run_distributed(messages, 2, checkpointing):
            assert sent == Counter(all_gather=gathers, reduce_scatter=2)


def complete_batch() -> str:
    """Return the error on rank 1 for the complete batch; on rank 0 its positions would be right."""
    if dist.get_rank() == 0:
        return ""
    model = tiny_model()
    enable_sequence_parallel(model, SequenceParallelContext(dist.group.WORLD))
    try:
        model(input_ids=tokens(1, 8), position_ids=torch.arange(8)[None])
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_complete_batch_is_refused_under_a_context() -> None:
    assert "call context.shard_batch(batch) first" in run_distributed(complete_batch, 2)[1]


def copies(mixer: str) -> list[str]:
    """Return what is wrong with copies of a model that runs on the shards of a group."""
    model, inputs = tiny_model(mixer).double(), batch(1, None)
    expected = model(inputs["input_ids"]).logits
    count = (inputs["labels"][:, 1:] != -100).sum()
    context = SequenceParallelContext(dist.group.WORLD)
    enable_sequence_parallel(model, context)
    local = {**context.shard_batch(inputs), "num_items_in_batch": count}
    model(**local).loss.backward()
    problems = []
    for name, twin in (("deepcopy", copy.deepcopy(model)), ("AveragedModel", AveragedModel(model))):
        twin.zero_grad()
        out = twin(**local)
        out.loss.backward()
        logits = unshard(out.logits, group=context.group, length=LENGTH, layout=context.layout)
        if not torch.allclose(logits, expected, rtol=1e-10, atol=1e-10):
            problems.append(f"{name}: logits")
        module: Any = twin.module if name == "AveragedModel" else twin
        found = gradients(module)
        if any(not torch.equal(g, found[key]) for key, g in gradients(model).items()):
            problems.append(f"{name}: gradients")
        if module.model.sequence_parallel_context is not context or module.lm_head.weight is model.lm_head.weight:
            problems.append(f"{name}: the context is shared, the weights are not")
        enable_sequence_parallel(module, None)
        if model.model.layers[0].get_submodule("self_attn").sequence_parallel_context is not context:
            problems.append(f"{name}: the original has lost its context")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    if any(getattr(module, "sequence_parallel_context", None) is not None for module in loaded.modules()):
        problems.append("torch.save: a context")
    if not torch.equal(loaded(inputs["input_ids"]).logits, expected):
        problems.append("torch.save: logits")
    return problems


@pytest.mark.parametrize("mixer", ["gla", "retention"])
def test_copies_run_sharded_and_saved_models_plain(mixer: str) -> None:
    assert run_distributed(copies, 2, mixer) == [[], []]
