"""Cutting and joining tensors and batches, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from linear_llama3.sequence_parallel import (
    SequenceParallelConfig,
    SequenceParallelContext,
    enable_sequence_parallel,
    linear_attention,
    linformer_attention,
    shard,
    softmax_attention,
    unshard,
)
from tests.helpers.ranks import run_distributed


def there_and_back() -> list[str]:
    problems = []
    for length, dim in ((1, 1), (5, 1), (7, 0), (8, 2)):
        shape = [2, 2, 2]
        shape[dim] = length
        complete = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        local = shard(complete, group=dist.group.WORLD, dim=dim).requires_grad_()
        if local.shape[dim] != -(-length // 4):
            problems.append(f"{length}: a part of {local.shape[dim]}")
        joined = unshard(local, group=dist.group.WORLD, length=length, dim=dim - 3)
        if not torch.equal(joined, complete):
            problems.append(f"{length}: not the sequence")
        weights = torch.arange(complete.numel()).view(complete.shape).double() + 1
        (joined * weights).sum().backward()  # the same loss on every rank
        if local.grad is None or not torch.equal(local.grad, shard(weights, group=dist.group.WORLD, dim=dim)):
            problems.append(f"{length}: gradient")
    return problems


def test_unshard_inverts_shard() -> None:
    """`[.., T, ..]` -> `[.., ceil(T / 4), ..]` -> `[.., T, ..]`"""
    assert run_distributed(there_and_back, 4) == [[]] * 4


def cut(batch: dict[str, torch.Tensor]) -> dict[str, list]:
    local = SequenceParallelContext(dist.group.WORLD).shard_batch(batch)
    return {name: x.tolist() for name, x in local.items()}


def test_labels_are_shifted_before_the_cut() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])
    left, right = run_distributed(cut, 2, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(2, 5)})
    assert left["input_ids"] == [[1, 2, 3], [6, 7, 8]]
    assert left["shift_labels"] == [[2, 3, 4], [7, 8, 9]]
    assert left["position_ids"] == [[0, 1, 2]] * 2
    assert right["input_ids"] == [[4, 5, 0], [9, 0, 0]]
    assert right["labels"] == [[4, 5, -100], [9, 0, -100]]
    assert right["shift_labels"] == [[5, -100, -100], [0, -100, -100]]
    assert right["position_ids"] == [[3, 4, 5]] * 2  # they run on over the padding
    assert "attention_mask" not in left and "cu_seq_lens_q" not in left


@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "empty documents"])
def test_packed_rows_become_one_sequence(told_by: str) -> None:
    ids = torch.arange(1, 11).view(2, 5)
    told = {
        "position_ids": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]),
        "cu_seq_lens_q": torch.tensor([0, 2, 5, 9, 10]),
        "cu_seq_lens_k": torch.tensor([0, 2, 5, 9, 10]),
        "seq_idx": torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 3]], dtype=torch.int32),
        "empty documents": torch.tensor([0, 0, 2, 5, 5, 5, 9, 10, 10]),  # as DataCollatorWithFlattening makes them
    }
    name = "cu_seq_lens_q" if told_by == "empty documents" else told_by
    parts = run_distributed(cut, 3, {"input_ids": ids, "labels": ids, name: told[told_by]})
    assert [p["input_ids"] for p in parts] == [[[1, 2, 3, 4]], [[5, 6, 7, 8]], [[9, 10, 0, 0]]]
    assert [p["shift_labels"] for p in parts] == [[[2, 3, 4, 5]], [[-100, 7, 8, 9]], [[10, -100, -100, -100]]]
    assert [p["position_ids"][0] for p in parts[:2]] == [[0, 1, 0, 1], [2, 0, 1, 2]]
    assert parts[2]["position_ids"] == [[3, 0, 0, 1]]
    assert all(p["cu_seq_lens_q"] == p["cu_seq_lens_k"] == [0, 2, 5, 9, 10, 12] for p in parts)


def test_other_entries_pass_through() -> None:
    batch = {
        "input_ids": torch.ones(1, 4, dtype=torch.long),
        "seq_idx": torch.zeros(1, 4, dtype=torch.int32),
        "num_items_in_batch": torch.tensor(3),
        "flag": True,
    }
    local = SequenceParallelContext(None).shard_batch(batch)
    assert local["flag"] is True and local["num_items_in_batch"] == 3 and "labels" not in local
    assert "seq_idx" not in local and "cu_seq_lens_q" not in local  # one document


def test_positions_of_all_rows_at_once() -> None:
    rows = torch.ones(3, 4, dtype=torch.long)
    local = SequenceParallelContext(None).shard_batch({"input_ids": rows, "position_ids": torch.arange(4)[None] + 2})
    assert local["position_ids"].tolist() == [[2, 3, 4, 5]] * 3


ONES = torch.ones(1, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": ONES}, "input_ids or inputs_embeds"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "at least one token"),
        ({"input_ids": ONES, "attention_mask": torch.tensor([[0, 1, 1, 1]])}, "padding on the right only"),
        ({"input_ids": ONES[0]}, r"input_ids must be \[B, T\], got shape \(4,\)"),
        ({"inputs_embeds": ONES}, r"inputs_embeds must be \[B, T, D\], got shape \(1, 4\)"),
        ({"input_ids": ONES, "attention_mask": torch.ones(1, 1, 4, 4)}, r"attention_mask must be \[B, T\] = \(1, 4\)"),
        ({"input_ids": ONES, "attention_mask": ONES[:, :3]}, r"attention_mask must be .* got shape \(1, 3\)"),
        ({"input_ids": ONES, "labels": ONES[:, :3]}, r"labels must be \[B, T\] = \(1, 4\) .* got shape \(1, 3\)"),
        ({"input_ids": ONES, "shift_labels": ONES.expand(2, 4)}, r"shift_labels must be .* got shape \(2, 4\)"),
        ({"input_ids": ONES.expand(2, 4), "labels": ONES}, r"labels must be \[B, T\] = \(2, 4\)"),
        ({"input_ids": ONES, "position_ids": torch.arange(5)[None]}, r"position_ids must be .* got shape \(1, 5\)"),
        ({"input_ids": ONES, "position_ids": ONES.expand(3, 1, 4)}, r"position_ids must be .* got shape \(3, 1, 4\)"),
        ({"input_ids": ONES, "cu_seq_lens_q": torch.tensor([0, 3])}, "increase from 0 to"),
        (
            {"input_ids": ONES, "cu_seq_lens_q": torch.tensor([0, 4]), "cu_seq_lens_k": torch.tensor([0, 3, 4])},
            r"cu_seq_lens_q and cu_seq_lens_k must describe the same documents, got edges \[0, 4\] and \[0, 3, 4\]",
        ),
        (
            {"input_ids": ONES, "cu_seq_lens_q": torch.tensor([0, 4]), "seq_idx": torch.tensor([[0, 0, 0, 1]])},
            r"cu_seq_lens_q and seq_idx must describe the same documents, got edges \[0, 4\] and \[0, 3, 4\]",
        ),
        (
            {"input_ids": ONES, "seq_idx": torch.tensor([[4, 4, 7, 7]]), "position_ids": torch.tensor([[0, 1, 2, 0]])},
            r"seq_idx and position_ids .* edges \[0, 2, 4\], but positions that continue at token 2 of row 0",
        ),
        ({"input_ids": ONES, "seq_idx": ONES[:, :3]}, r"seq_idx must hold .* \[B, T\] = \(1, 4\), got torch.int64 .*3"),
        ({"input_ids": ONES, "token_type_ids": ONES}, r"cuts no other .*'token_type_ids' of shape \(1, 4\)"),
        ({"input_ids": ONES, "bias": torch.ones(1, 4, 3)}, r"cuts no other .*'bias' of shape \(1, 4, 3\)"),
    ],
)
def test_batches_that_are_refused(batch: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceParallelContext(None).shard_batch(batch)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"linear": "ring"}, "linear layers must be one of .*got 'ring'"),
        ({"softmax": "lasp2"}, "softmax layers must be one of .*got 'lasp2'"),
        ({"layout": "spiral"}, "layout must be one of .*got 'spiral'"),
    ],
)
def test_unknown_names(names: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceParallelConfig(**names)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has none"):
        enable_sequence_parallel(nn.Linear(1, 1), SequenceParallelContext(None))


X = torch.ones(1, 4, 2, 3)


def use_groups() -> list[list[str]]:
    """The errors of each use on the last rank: for a group without it, a mesh, and a name."""
    mixed = partial(linformer_attention, X, X, X, torch.ones(2, 4), torch.ones(2, 4))
    uses: list[Callable[..., object]] = [SequenceParallelContext, partial(shard, X), partial(unshard, X, length=4)]
    uses += [mixed, *(partial(op, X, X, X) for op in (linear_attention, softmax_attention))]
    groups = [dist.new_group([0, 1]), init_device_mesh("cpu", (3,)), "cp"]
    return [[refusal(use, group) for use in uses] for group in groups] if dist.get_rank() == 2 else []


def refusal(use: Callable[..., object], group: object) -> str:
    try:
        use(group=group)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_groups_that_are_refused() -> None:
    without, mesh, name = run_distributed(use_groups, 3)[2]
    assert all(re.search("group must hold this process, got one without global rank 2; ", x) for x in without)
    assert all(re.search(r"group must be a ProcessGroup or None, got a DeviceMesh; .*get_group\(\)", x) for x in mesh)
    assert all("group must be a ProcessGroup or None, got a str" in x for x in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 5}, "length must be between 1 and .* got 5"),
        ({"length": 0}, "length must be between 1 and"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "end at T = 4"),
        ({"strategy": "mail"}, "got 'mail'"),
        ({"layout": "mail"}, "got 'mail'"),
    ],
)
def test_calls_that_are_refused(options: dict[str, Any], message: str) -> None:
    for attention in (linear_attention, softmax_attention):
        with pytest.raises(ValueError, match=message):
            attention(X, X, X, group=None, **options)


def test_sliding_window_needs_a_direction() -> None:
    with pytest.raises(ValueError, match="needs causal=True"):
        softmax_attention(X, X, X, group=None, sliding_window=2, causal=False)
    with pytest.raises(ValueError, match="sliding_window must be at least 1"):
        softmax_attention(X, X, X, group=None, sliding_window=0)


@pytest.mark.parametrize("window", [2.0, 2.5, True, "2", torch.tensor(2.5)])
def test_sliding_window_is_a_number_of_tokens(window: object) -> None:
    with pytest.raises(ValueError, match=f"sliding_window must be an integer, .* got {re.escape(repr(window))}"):
        softmax_attention(X, X, X, group=None, sliding_window=window)  # type: ignore[arg-type]


def test_length_names_itself_beside_edges() -> None:
    for attention in (linear_attention, softmax_attention):
        with pytest.raises(ValueError, match=r"end at T = 3, .*`length`.* got \(0, 2, 4\)"):
            attention(X, X, X, group=None, cu_seqlens=torch.tensor([0, 2, 4]), length=3)


def without_empty_documents(kind: str, layout: str) -> float:
    """Return the errors of output and gradients against edges without empty documents."""
    attention: Callable[..., Tensor] = linear_attention if kind == "linear" else softmax_attention
    found = []
    for edges in ([0, 0, 3, 3, 9, 14, 14], [0, 3, 9, 14]):
        torch.manual_seed(0)
        x = [torch.randn(1, 14, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        local = [shard(t, group=dist.group.WORLD, layout=layout) for t in x]
        out = attention(*local, group=dist.group.WORLD, layout=layout, cu_seqlens=torch.tensor(edges))
        weight = torch.arange(out.numel()).view_as(out)
        found.append([out, *torch.autograd.grad((out * weight).sum(), x)])
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("kind", ["linear", "softmax"])
def test_documents_without_tokens(kind: str, layout: str) -> None:
    assert max(run_distributed(without_empty_documents, 3, kind, layout)) == 0
