"""Streams of the `datasets` library: sequence-parallel ranks read the same rows, replicas read different ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from datasets import IterableDataset, load_dataset

from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments
from tests.helpers.checkpoint import TEXTS, load, tokenizer
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed
from tests.helpers.training import SequentialTrainer, arguments, assert_same, outcome, reset_accelerate

LENGTH = 24


def write(folder: Path, files: int) -> None:
    """One document per line."""
    share = len(TEXTS) // files
    for i in range(files):
        lines = [json.dumps({"text": text}) for text in TEXTS[i * share : (i + 1) * share]]
        (folder / f"{i}.jsonl").write_text("\n".join(lines))


def rows(checkpoint: str, folder: str, streaming: bool, seeds: tuple[int, ...]) -> Any:
    words = tokenizer(checkpoint)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        rows = words(batch["text"], truncation=True, max_length=LENGTH, padding="max_length")
        masks = zip(rows["input_ids"], rows["attention_mask"], strict=True)
        return {**rows, "labels": [[i if m else -100 for i, m in zip(ids, mask, strict=True)] for ids, mask in masks]}

    files = sorted(str(path) for path in Path(folder).glob("*.jsonl"))
    data = load_dataset("json", data_files=files, split="train", streaming=streaming)
    if seeds:  # one for all processes, or one for each
        data = data.shuffle(seed=seeds[dist.get_rank() % len(seeds)], buffer_size=4)
    return data.map(tokenize, batched=True, batch_size=3, remove_columns=["text"])


def train(
    degree: int, checkpoint: str, folder: str, changes: dict[str, Any], streaming: bool, seeds: tuple[int, ...]
) -> dict[str, Any]:
    """Train with 4 rows per step; record the rows that this process received."""
    reset_accelerate()
    seen: list[list[int]] = []

    class Recorder(LinearLlama3Trainer if streaming else SequentialTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            seen.extend(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    keywords = arguments(folder, dist.get_world_size() // degree, sequence_parallel_size=degree, learning_rate=0.03)
    data = rows(checkpoint, folder, streaming, seeds)
    assert isinstance(data, IterableDataset) == streaming
    try:
        args = LinearLlama3TrainingArguments(**{**keywords, **changes})
        trainer = Recorder(model=load(checkpoint), args=args, train_dataset=data)
        trainer.train(resume_from_checkpoint=changes.get("resume_from_checkpoint"))
        return {**outcome(trainer), "seen": seen}
    except ValueError as error:
        return {"refused": str(error)}
    finally:
        reset_accelerate()


def run(
    world: int,
    degree: int,
    checkpoint: Path,
    folder: Path,
    *,
    streaming: bool = True,
    seeds: tuple[int, ...] = (),
    **changes: Any,
) -> list[dict[str, Any]]:
    return run_distributed(train, world, degree, str(checkpoint), str(folder), changes, streaming, seeds)


@slow_unless(lambda files: files == 1, files=[1, 4])
def test_a_stream_trains_like_the_data_set(files: int, checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path, files)
    (one,) = run(1, 1, checkpoint, tmp_path, streaming=False)
    for world in (1, 2):
        for streamed in run(world, world, checkpoint, tmp_path):
            assert_same(streamed, one, world)
            assert streamed["seen"] == one["seen"]


@slow_unless(lambda files: files == 1, files=[1, 4])
def test_replicas_share_a_stream(files: int, checkpoint: Path, tmp_path: Path) -> None:
    """Two replicas of two ranks; with enough files, accelerate assigns complete files to replicas."""
    write(tmp_path, files)
    (one,) = run(1, 1, checkpoint, tmp_path)
    runs = run(4, 2, checkpoint, tmp_path)
    assert runs[0]["seen"] == runs[1]["seen"] and runs[2]["seen"] == runs[3]["seen"]
    assert sorted(runs[0]["seen"] + runs[2]["seen"]) == sorted(one["seen"])
    if files == 1:
        for streamed in runs:
            assert_same(streamed, one, "replicas")


@pytest.mark.slow
def test_a_shuffled_stream_is_the_same_on_all_ranks(checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path, 2)
    (one,) = run(1, 1, checkpoint, tmp_path, seeds=(0,))
    assert one["seen"] != run(1, 1, checkpoint, tmp_path)[0]["seen"]
    for shuffled in run(2, 2, checkpoint, tmp_path, seeds=(0,)):
        assert shuffled["seen"] == one["seen"]


@slow_unless(lambda seeds: seeds == (0, 8), seeds=[(0, 2), (0, 8), (0, 5)])
def test_different_streams_are_refused(seeds: tuple[int, ...], checkpoint: Path, tmp_path: Path) -> None:
    """The rows differ in the first, second or third batch. Without a seed, every process would draw its own."""
    write(tmp_path, 2)
    for refused in run(2, 2, checkpoint, tmp_path, seeds=seeds):
        assert "must load the same batch" in refused["refused"]


@pytest.mark.slow
def test_different_streams_after_a_resume_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    """The first batch of the resumed run is checked."""
    write(tmp_path, 2)
    run(2, 2, checkpoint, tmp_path, max_steps=1, save_strategy="steps", save_steps=1, seeds=(0,))
    saved = str(tmp_path / "checkpoint-1")
    for refused in run(2, 2, checkpoint, tmp_path, max_steps=2, resume_from_checkpoint=saved, seeds=(0, 2)):
        assert "must load the same batch" in refused["refused"]


def test_a_resumed_stream_continues_with_the_next_rows(checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path, 2)
    (one,) = run(1, 1, checkpoint, tmp_path)
    run(2, 2, checkpoint, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    for resumed in run(2, 2, checkpoint, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1")):
        assert_same(resumed, one, "resumed")
        assert resumed["seen"] == one["seen"][4:]
