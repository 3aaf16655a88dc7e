"""Training on any grid of (data-parallel, sequence-parallel) processes is training on one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from torch import Tensor
from transformers import TrainingArguments

from linear_llama3.sequence_parallel import LAYOUTS
from linear_llama3.trainer import LinearLlama3TrainingArguments
from tests.helpers.ranks import run_distributed
from tests.helpers.training import (
    GRIDS,
    LENGTH,
    SequentialTrainer,
    arguments,
    assert_same,
    outcome,
    reset_accelerate,
    rows,
    tiny_model,
)


def train(world: int, degree: int, packed: bool, checkpointing: bool, folder: str, **choices: str) -> dict[str, Any]:
    """A run, its evaluation loss, and its logits."""
    reset_accelerate()
    changes = {"sequence_parallel_size": degree, "gradient_checkpointing": checkpointing, **choices}
    args = LinearLlama3TrainingArguments(**arguments(folder, world // degree, **changes))
    data = rows(packed)
    trainer = SequentialTrainer(model=tiny_model(), args=args, train_dataset=data, eval_dataset=data[:6])
    assert trainer.get_total_train_batch_size(args) == 4
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    prediction = trainer.predict(data[:6])
    unlabelled = trainer.predict([{name: x for name, x in row.items() if name != "labels"} for row in data[:6]])
    assert unlabelled.label_ids is None and "test_loss" not in unlabelled.metrics
    assert abs(unlabelled.predictions - prediction.predictions).max() < 1e-5, "labels change no logits"
    reset_accelerate()
    return {
        **outcome(trainer),
        "eval": evaluated,
        "logits": prediction.predictions,
        "labels": prediction.label_ids,
    }


def train_with(linear: str, softmax: str, layout: str, folder: str) -> dict[str, Any]:
    return train(2, 2, True, False, folder, linear_strategy=linear, softmax_strategy=softmax, sequence_layout=layout)


@pytest.mark.parametrize(
    "layout", [pytest.param(layout, marks=[pytest.mark.slow] * (layout == "contiguous")) for layout in LAYOUTS]
)
@pytest.mark.parametrize(
    ("linear", "softmax"),
    [
        ("lasp1", "ring"),
        pytest.param("all_scan", "token_ring", marks=pytest.mark.slow),
        ("all_to_all", "rsa"),
        pytest.param("lasp2", "ulysses", marks=pytest.mark.slow),
        ("auto", "auto"),
    ],
)
def test_strategies_by_name(linear: str, softmax: str, layout: str, tmp_path: Path) -> None:
    (one,) = run_distributed(train, 1, 1, 1, True, False, str(tmp_path))
    for run in run_distributed(train_with, 2, linear, softmax, layout, str(tmp_path)):
        assert_same(run, one, (linear, softmax, layout))
        assert run["eval"] == pytest.approx(one["eval"], rel=1e-5)
        assert abs(run["logits"] - one["logits"]).max() < 1e-4


@pytest.mark.parametrize(
    ("grids", "packed", "checkpointing"),
    [
        pytest.param([(1, 1), (2, 1), (4, 2)], True, False, id="packed"),
        pytest.param([(1, 1), (2, 2)], True, True, id="packed-checkpointing"),
        pytest.param(GRIDS, False, False, id="rows-all_grids", marks=pytest.mark.slow),
        pytest.param(GRIDS, True, False, id="packed-all_grids", marks=pytest.mark.slow),
        pytest.param(GRIDS, False, True, id="rows-checkpointing-all_grids", marks=pytest.mark.slow),
    ],
)
def test_any_grid_equals_one_process(
    grids: list[tuple[int, int]], packed: bool, checkpointing: bool, tmp_path: Path
) -> None:
    results = {grid: run_distributed(train, grid[0], *grid, packed, checkpointing, str(tmp_path)) for grid in grids}
    (one,) = results[1, 1]
    assert one["history"][0][0] != pytest.approx(one["history"][1][0], rel=1e-2), "nothing was learnt"
    assert one["tokens"] == 8 * LENGTH
    for grid, ranks in results.items():
        for run in ranks:
            assert_same(run, one, grid)
            assert run["eval"] == pytest.approx(one["eval"], rel=1e-4), grid
            assert run["logits"].shape == (6, LENGTH, 23) and (run["labels"] == one["labels"]).all(), grid
            assert abs(run["logits"] - one["logits"]).max() < 1e-4, grid


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from rows(False)


def train_as(kind: str, degree: int, folder: str) -> dict[str, Any]:
    """A run whose degree, data or arguments come in another way."""
    reset_accelerate()
    world = dist.get_world_size()
    changes: dict[str, Any] = {"include_num_input_tokens_seen": "all"}
    data: Any = rows(False)
    arguments_class: type[TrainingArguments] = TrainingArguments
    if kind == "environment":  # as accelerate launch --use_parallelism_config true --parallelism_config_cp_size
        os.environ |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": str(degree)}
    elif kind == "config":
        changes["parallelism_config"] = ParallelismConfig(cp_size=degree, dp_shard_size=world // degree)
    else:
        arguments_class = LinearLlama3TrainingArguments
        changes["sequence_parallel_size"] = degree
        if kind == "stream":
            data = Stream()
        elif kind == "local count":
            changes["average_tokens_across_devices"] = False
    try:
        args = arguments_class(**arguments(folder, world // degree, **changes))
        trainer = SequentialTrainer(model=tiny_model(), args=args, train_dataset=data)
        trainer.train()
        assert (trainer.sequence_parallel_context is None) == (degree == 1)
        return outcome(trainer)
    finally:
        for name in ("ACCELERATE_USE_PARALLELISM_CONFIG", "PARALLELISM_CONFIG_CP_SIZE"):
            os.environ.pop(name, None)
        reset_accelerate()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["environment", "config", "stream"])
def test_other_ways_to_the_same_run(kind: str, world: int, tmp_path: Path) -> None:
    (one,) = run_distributed(train, 1, 1, 1, False, False, str(tmp_path))
    for run in run_distributed(train_as, world, kind, 2, str(tmp_path)):
        assert_same(run, one, (kind, world))


def train_after_evaluation(degree: int, folder: str) -> dict[str, Any]:
    reset_accelerate()
    args = LinearLlama3TrainingArguments(
        **arguments(folder, dist.get_world_size() // degree, sequence_parallel_size=degree)
    )
    data = rows(False)
    trainer = SequentialTrainer(model=tiny_model(), args=args, train_dataset=data, eval_dataset=data[:6])
    trainer.evaluate()
    trainer.train()
    reset_accelerate()
    return outcome(trainer)


@pytest.mark.parametrize("degree", [1, 2])
def test_an_evaluation_before_training_changes_nothing(degree: int, tmp_path: Path) -> None:
    """transformers 5.23 then trains without DDP: each process on its own gradient."""
    (one,) = run_distributed(train, 1, 1, 1, False, False, str(tmp_path))
    for run in run_distributed(train_after_evaluation, 2, degree, str(tmp_path)):
        assert_same(run, one, degree)


def test_without_a_global_count_the_degree_changes_nothing(tmp_path: Path) -> None:
    """Then the loss is a mean of the data-parallel processes' means, with a warning."""
    one, _ = run_distributed(train_as, 2, "local count", 1, str(tmp_path))
    for run in run_distributed(train_as, 4, "local count", 2, str(tmp_path)):
        assert_same(run, one, "local count")
