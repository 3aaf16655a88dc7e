"""A run that stops and continues, on the same or other processes, equals the run that never stopped."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from datasets import IterableDataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments
from linear_llama3.trainer.checkpoints import resume
from tests.helpers.ranks import run_distributed
from tests.helpers.training import arguments, outcome, reset_accelerate, rows, tiny_model

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("5.17."), reason="transformers 5.17 cannot resume on several CPU processes"
)

STEPS, STOP = 9, 5  # in the middle of an epoch, and of a pass
HISTORY = 3  # logged, every third step: the checkpoint holds losses that are not logged yet


def data(kind: str) -> Any:
    """Ten rows: steps of 4, 4 and 2 in an epoch; in a pass over a stream two steps of 4."""
    lines = rows(True)
    lines += [{name: x.roll(3) if name == "input_ids" else x for name, x in row.items()} for row in lines[:2]]
    if kind != "stream" and kind != "files":
        return lines if kind == "rows" else lines[:-2]
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
    """Stops a run after a save, like a machine that is switched off."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= STOP - 1


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def run(
    kind: str, degree: int, folder: str, checkpoint: str | bool | None, *, dropout: float = 0.0, **changes: Any
) -> dict[str, Any]:
    """Steps of 4 rows, shuffled, with AdamW and a schedule; from a checkpoint on, or, with `save_steps`, to its save,
    or neither."""
    reset_accelerate()
    replicas = dist.get_world_size() // degree
    keywords = arguments(folder, min(replicas, 2), sequence_parallel_size=degree)
    keywords |= {"gradient_accumulation_steps": 1 if replicas == 4 else 2}
    keywords |= {"optim": "adamw_torch", "adam_epsilon": 1e-3, "learning_rate": 0.01, "lr_scheduler_type": "linear"}
    keywords |= {"max_steps": STEPS, "warmup_steps": 3, "logging_steps": HISTORY, "seed": 3}
    stops = "save_steps" in changes
    keywords |= {"save_strategy": "steps"} if stops else {}
    model, warnings = tiny_model(), Warnings()
    model.config.attention_dropout = dropout
    for layer in model.model.layers:
        attention: Any = layer.self_attn
        attention.attention_dropout = dropout
    resume.logger.addHandler(warnings)
    try:
        args = LinearLlama3TrainingArguments(**keywords | changes)
        trainer = LinearLlama3Trainer(
            model=model, args=args, train_dataset=data(kind), callbacks=[Stop()] if stops else []
        )
        trained = trainer.train(resume_from_checkpoint=checkpoint)
    except ValueError as error:
        return {"refused": str(error), "warnings": warnings.texts}
    finally:
        resume.logger.removeHandler(warnings)
        reset_accelerate()
    return {
        **outcome(trainer),
        "step": trainer.state.global_step,
        "train_loss": trained.training_loss,
        "warnings": warnings.texts,
    }


def run_with(changes: dict[str, Any], *args: Any) -> dict[str, Any]:
    return run(*args, **changes)


SAVE = {"save_steps": STOP}


def assert_continues(resumed: dict[str, Any], complete: dict[str, Any], where: Any) -> None:
    assert "refused" not in resumed, (where, resumed)
    assert len(complete["history"]) == HISTORY and resumed["step"] == STEPS
    for got, expected in zip(resumed["history"], complete["history"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5), where
    for name, expected in complete["parameters"].items():
        assert abs(resumed["parameters"][name] - expected).max() < 1e-5, (where, name)
    assert resumed["tokens"] == complete["tokens"], where


GRIDS = [  # (processes, sequence-parallel degree) before and after the stop
    ((1, 1), (4, 2)),
    ((4, 2), (1, 1)),
    ((2, 2), (4, 1)),
    ((4, 1), (2, 2)),
    ((2, 1), (4, 4)),
]


@pytest.mark.parametrize(
    ("kind", "grids"),
    [
        pytest.param("rows", [((2, 2), (4, 1))], id="rows"),
        pytest.param("stream", [((4, 2), (1, 1))], id="stream"),
        pytest.param("rows", GRIDS, id="rows-all_grids", marks=pytest.mark.slow),
        pytest.param("stream", GRIDS[:2], id="stream-two_grids", marks=pytest.mark.slow),
        pytest.param("files", GRIDS[:2], id="files-two_grids", marks=pytest.mark.slow),
    ],
)
def test_a_resume_on_other_processes_equals_an_uninterrupted_run(kind: str, grids: Any, tmp_path: Path) -> None:
    (complete,) = run_distributed(run, 1, kind, 1, str(tmp_path / "complete"), None)
    assert complete["tokens"] == 13 * (30 if kind == "rows" else 36)
    for before, after in grids:
        folder = tmp_path / str(before)
        for stopped in run_distributed(run_with, before[0], SAVE, kind, before[1], str(folder), None):
            assert stopped["step"] == STOP
        assert load_file(folder / f"checkpoint-{STOP}" / "model.safetensors").keys() == complete["parameters"].keys()
        checkpoint = str(folder / f"checkpoint-{STOP}")
        for resumed in run_distributed(run, after[0], kind, after[1], str(tmp_path / "on"), checkpoint):
            assert_continues(resumed, complete, (before, after))


def test_random_numbers_continue_on_the_same_processes(tmp_path: Path) -> None:
    """Dropout is exact on the same number of processes; on others there is a warning, and ranks do not differ."""
    dropout, folder = {"dropout": 0.5}, str(tmp_path / "stopped")
    complete, _ = run_distributed(run_with, 2, dropout, "rows", 1, str(tmp_path / "complete"), None)
    (plain,) = run_distributed(run, 1, "rows", 1, str(tmp_path / "plain"), None)
    assert complete["history"][0] != pytest.approx(plain["history"][0], rel=1e-3), "nothing was dropped"
    run_distributed(run_with, 2, dropout | SAVE, "rows", 1, folder, None)
    for resumed in run_distributed(
        run_with, 2, dropout, "rows", 1, str(tmp_path / "on"), f"{folder}/checkpoint-{STOP}"
    ):
        assert_continues(resumed, complete, "dropout")
        assert not resumed["warnings"]
    (other,) = run_distributed(run_with, 1, dropout, "rows", 1, str(tmp_path / "on"), f"{folder}/checkpoint-{STOP}")
    assert other["step"] == STEPS and other["history"][-1] != pytest.approx(complete["history"][-1], rel=1e-3)
    assert any("start again, since 2 processes saved and 1 continue" in text for text in other["warnings"])


def break_weights(folder: Path) -> None:
    """Cut the last byte of the weights."""
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def test_the_newest_complete_checkpoint_is_used(tmp_path: Path) -> None:
    complete, _ = run_distributed(run, 2, "rows", 2, str(tmp_path / "complete"), None)
    folder = tmp_path / "stopped"
    run_distributed(run_with, 2, {"save_steps": 2}, "rows", 2, str(folder), None)
    break_weights(folder / "checkpoint-4")
    for resumed in run_distributed(run, 2, "rows", 2, str(folder), True):
        assert_continues(resumed, complete, "from step 2")
    assert any("checkpoint-4 is not complete: model.safetensors has" in t for t in run_first(folder, "latest"))
    for resumed in run_distributed(run, 2, "rows", 2, str(folder), f"{folder}/checkpoint-4"):
        assert "must be complete" in resumed["refused"] and "bytes of" in resumed["refused"]
    (folder / "checkpoint-2" / "optimizer.pt").unlink()
    for resumed in run_distributed(run, 2, "rows", 2, str(folder), True):
        assert "needs a complete checkpoint in output_dir" in resumed["refused"]
    shutil.rmtree(folder / "checkpoint-4")
    for resumed in run_distributed(run, 2, "rows", 2, str(folder), "latest"):
        assert_continues(resumed, complete, "from the start")


def run_first(folder: Path, checkpoint: str) -> list[str]:
    return run_distributed(run, 2, "rows", 2, str(folder), checkpoint)[0]["warnings"]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("rows", {"per_device_train_batch_size": 1}, "the rows_per_step that it had, 4, got 2; set gradient_acc"),
        ("less", {}, "the rows_per_epoch that it had, 10, got 8; train on the same data"),
        ("stream", {}, "the rows_per_epoch that it had, 10, got None"),
        ("rows", {"data_seed": 5}, "the seed that it had"),
        ("rows", {"train_sampling_strategy": "sequential"}, "the sampler that it had, SeedableRandomSampler"),
        ("rows", {"per_device_train_batch_size": 1, "ignore_data_skip": True}, ""),
    ],
)
def test_a_resume_that_would_not_be_exact_is_refused(
    kind: str, changes: dict[str, Any], message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "stopped"
    if not folder.exists():
        run_distributed(run_with, 1, SAVE, "rows", 1, str(folder), None)
    (resumed,) = run_distributed(run_with, 1, changes, kind, 1, str(folder) + "-on", f"{folder}/checkpoint-{STOP}")
    assert message in resumed["refused"] if message else resumed["step"] == STEPS
