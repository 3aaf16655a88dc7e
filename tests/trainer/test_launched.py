"""Launched processes form one group, or nothing trains. An error that all ranks find is printed once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

from linear_llama3.commands import evaluation, needle
from linear_llama3.trainer import (
    LinearLlama3Trainer,
    LinearLlama3TrainingArguments,
    SequenceParallelAccelerator,
    SequenceParallelMixin,
    launched,
)
from linear_llama3.trainer import __main__ as program
from linear_llama3.trainer.launched import SIZES, check_launch, launched_processes
from tests.helpers.launch import launch
from tests.helpers.recipes import recipe_with, write_corpus, write_tokenizer
from tests.helpers.training import reset_accelerate, rows, tiny_model


class PlainTrainer(SequenceParallelMixin, Trainer):
    """A Trainer with transformers' own arguments, as with TRL."""


def trainer(kind: type[Trainer], folder: str, arguments: type[TrainingArguments], **changes: Any) -> Trainer:
    args = arguments(output_dir=folder, report_to=[], max_steps=1, **changes)
    return kind(model=tiny_model(), args=args, train_dataset=rows(False))


def refusals(folder: str) -> None:
    """Write the error of each class without GPUs, where accelerate joins processes only on request."""
    os.environ.pop("ACCELERATE_USE_CPU")
    dist.init_process_group("gloo")  # as accelerate itself does here, without counting its processes
    attempts: dict[str, Callable[[], Any]] = {
        "accelerator": SequenceParallelAccelerator,
        "data-parallel": lambda: SequenceParallelAccelerator(sequence_parallel_size=1),
        "trainer": lambda: trainer(LinearLlama3Trainer, folder, LinearLlama3TrainingArguments),
        "degree": lambda: trainer(LinearLlama3Trainer, folder, LinearLlama3TrainingArguments, sequence_parallel_size=2),
        "mixin": lambda: trainer(PlainTrainer, folder, TrainingArguments),
        "asked to": lambda: trainer(PlainTrainer, folder, TrainingArguments, use_cpu=True),
        "asked for": lambda: SequenceParallelAccelerator(cpu=True),
    }
    said = {}
    for name, attempt in attempts.items():
        reset_accelerate()
        try:
            attempt()
            said[name] = "joined"
        except ValueError as error:
            said[name] = str(error)
    Path(folder, f"said-{os.environ['RANK']}").write_text(json.dumps(said))


@pytest.mark.slow
def test_processes_that_accelerate_has_not_joined_are_refused(tmp_path: Path) -> None:
    ended = launch(refusals, 2, str(tmp_path), folder=tmp_path / "log")
    assert ended.exit_code == 0, ended.errors
    for rank in range(2):
        said = json.loads((tmp_path / f"said-{rank}").read_text())
        assert said.pop("asked to") == said.pop("asked for") == "joined"
        assert len(said) == 5
        for name, text in said.items():
            assert "must form one group, got 2 (WORLD_SIZE=2) of which accelerate has joined 1" in text, name
            assert "set ACCELERATE_USE_CPU=true" in text


def commands(folder: str, recipe: str) -> None:
    """Run the commands, which ask accelerate themselves to join the processes."""
    os.environ.pop("ACCELERATE_USE_CPU")
    program.main(Path(recipe), [f"training.output_dir={folder}/out"])
    dist.barrier()  # rank 0 saves
    reset_accelerate()
    evaluation.evaluate(f"{folder}/out", [f"{folder}/../corpus/1.txt"], length=6, output=Path(folder))
    reset_accelerate()
    needle.needle(f"{folder}/out", [16], [0.5], samples=2, tokens=True, output=Path(folder))


@pytest.mark.slow
def test_commands_join_the_processes_of_a_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes have the losses of one, and print each table once."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path / "corpus")
    write_tokenizer(tmp_path / "tokenizer")
    training = {"max_steps": 3, "report_to": "none", "logging_steps": 1, "per_device_train_batch_size": 1}
    recipe = recipe_with(tmp_path, sequence_length=9, training={**training, "output_dir": "", "save_strategy": "no"})
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        ended = launch(commands, processes, str(folder), str(recipe), folder=folder / "log")
        assert ended.exit_code == 0, ended.errors
        printed = "".join(log.read_text() for log in folder.rglob("stdout.log"))
        assert printed.count("16 tokens, depth  50%") == 1, printed
        assert printed.count("2 to         3 tokens of context") == 1, printed
        history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
        buckets = json.loads((folder / f"{evaluation.NAME}.json").read_text())["by_context"]
        cells = json.loads((folder / f"{needle.NAME}.json").read_text())
        found[processes] = [entry["loss"] for entry in [*(h for h in history if "loss" in h), *buckets, *cells]]
    assert len(found[1]) == 3 + 3 + 1
    assert found[2] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1"}, 1),
        ({"WORLD_SIZE": "8", "RANK": "3"}, 8),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "3"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16", "RANK": "3"}, 16),  # torchrun on two nodes of srun
    ],
)
def test_the_number_of_launched_processes(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*SIZES, "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_processes() == expected
    check_launch(expected)
    with pytest.raises(ValueError, match=f"must form one group, got {expected} .* has joined {expected + 1}"):
        check_launch(expected + 1)


def test_half_a_launch_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="got WORLD_SIZE=8 without it; unset WORLD_SIZE if it is left over"):
        launched_processes()


@pytest.mark.parametrize(("rank", "waited"), [(None, []), ("0", []), ("1", [launched.GRACE])])
def test_an_error_is_left_to_rank_0(rank: str | None, waited: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(launched.time, "sleep", slept.append)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit, match="error: a mistake"):
        launched.fail(ValueError("a mistake"))
    assert slept == waited
