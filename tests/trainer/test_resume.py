"""A run that stops and goes on, on the same processes or on others, is the run that never stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from datasets import IterableDataset
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments
from linear_llama3.trainer.data_order import DataOrder, WholeSteps
from tests.distributed import run_distributed
from tests.trainer.test_exactness import arguments, outcome, reset_accelerate, rows, tiny_model

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("5.17."), reason="transformers 5.17 cannot resume on several CPU processes"
)

import os
LR=float(os.environ.get('LR','0.05'))
STEPS, STOP = 9, 4
HISTORY = 3  # logged, every third step: a checkpoint of step 4 holds a loss that is not logged yet


def data(kind: str) -> Any:
    """Ten rows: steps of 4, 4 and 2 in an epoch; in a pass over a stream two steps of 4."""
    lines = rows(True)
    lines += [{name: x.roll(3) if name == "input_ids" else x for name, x in row.items()} for row in lines[:2]]
    if kind == "rows":
        return lines
    if kind == "stream":
        return Stream(lines)
    shards = [lines[:3], lines[3:5], lines[5:8], lines[8:]]  # as files, which come in another order in every pass
    files = IterableDataset.from_generator(generate, gen_kwargs={"shards": shards})
    return files.shuffle(seed=5, buffer_size=3)


def generate(shards: list[list[dict[str, Tensor]]]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for row in shard:
            yield {name: x.tolist() for name, x in row.items()}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, lines: list[dict[str, Tensor]]) -> None:
        self.lines = lines

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from self.lines


class Stop(TrainerCallback):
    """As a machine that is switched off behind a save."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == STOP


def run(kind: str, degree: int, folder: str, checkpoint: str | None, stop: bool, **changes: Any) -> dict[str, Any]:
    """Steps of 4 rows, shuffled, with AdamW and a schedule; from a checkpoint, or to its save, or neither."""
    reset_accelerate()
    replicas = dist.get_world_size() // degree
    keywords = arguments(folder, min(replicas, 2), sequence_parallel_size=degree)
    keywords |= {"gradient_accumulation_steps": 1 if replicas == 4 else 2}
    keywords |= {"optim": "adamw_torch", "adam_epsilon": 1e-3, "learning_rate": LR, "lr_scheduler_type": "linear"}
    keywords |= {"max_steps": STEPS, "warmup_steps": 3, "logging_steps": HISTORY, "seed": 3}
    keywords |= {"save_strategy": "steps", "save_steps": STOP} if stop else {}
    args = LinearLlama3TrainingArguments(**keywords | changes)
    trainer = LinearLlama3Trainer(
        model=tiny_model(), args=args, train_dataset=data(kind), callbacks=[Stop()] if stop else []
    )
    try:
        trained = trainer.train(resume_from_checkpoint=checkpoint)
    except ValueError as error:
        return {"refused": str(error)}
    finally:
        reset_accelerate()
    return {**outcome(trainer), "step": trainer.state.global_step, "train_loss": trained.training_loss}


def assert_goes_on(resumed: dict[str, Any], whole: dict[str, Any], where: Any) -> None:
    assert len(whole["history"]) == HISTORY
    for got, expected in zip(resumed["history"], whole["history"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5), where
    for name, expected in whole["parameters"].items():
        assert abs(resumed["parameters"][name] - expected).max() < 1e-5, (where, name)
    assert resumed["tokens"] == whole["tokens"], where


GRIDS = [  # (processes, sequence-parallel degree) before the stop and behind it
    ((1, 1), (4, 2)),
    ((2, 2), (4, 1)),
    ((4, 1), (2, 2)),
    ((4, 2), (1, 1)),
    ((2, 1), (4, 4)),
]


@pytest.mark.parametrize("kind", ["rows", "stream", "files"])
def test_a_resume_on_other_processes_goes_on_as_before(kind: str, tmp_path: Path) -> None:
    (whole,) = run_distributed(run, 1, kind, 1, str(tmp_path / "whole"), None, False)
    assert whole["tokens"] == 13 * (30 if kind == "rows" else 36)
    for before, behind in GRIDS if kind == "rows" else GRIDS[:3]:
        folder = tmp_path / str(before)
        for stopped in run_distributed(run, before[0], kind, before[1], str(folder), None, True):
            assert stopped["step"] == STOP
        checkpoint = str(folder / f"checkpoint-{STOP}")
        for resumed in run_distributed(run, behind[0], kind, behind[1], str(tmp_path / "on"), checkpoint, False):
            assert_goes_on(resumed, whole, (before, behind))
