"""Streams in complete steps, and content hashes by which a resume recognizes its data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from linear_llama3.trainer.data import order
from linear_llama3.trainer.data.order import CompleteSteps, check_order, content_hash
from linear_llama3.trainer.data.training_rows import training_rows
from linear_llama3.trainer.recipes.recipe import DataRecipe
from tests.helpers.recipes import write_corpus, write_tokenizer


class FirstWorkerOnly(IterableDataset):
    """A stream of one file, which one of a loader's workers reads."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(5)) if info is None or info.id == 0 else iter(())


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_worker_may_have_nothing_to_read(workers: int) -> None:
    loader = DataLoader(CompleteSteps(FirstWorkerOnly(), 2), batch_size=2, num_workers=workers)
    assert torch.cat(list(loader)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("worker", [None, SimpleNamespace(id=0, num_workers=2)], ids=["process", "worker"])
def test_a_stream_must_fill_a_step(worker: SimpleNamespace | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a DataLoader: after an error in a worker, torch takes 5 s to end it."""
    monkeypatch.setattr(order, "get_worker_info", lambda: worker)
    with pytest.raises(ValueError, match="must hold the rows of a step, 6, got 5; add data"):
        list(CompleteSteps(range(5), 6))


def test_content() -> None:
    rows = [{"input_ids": [i, i + 1], "labels": [i, i + 1]} for i in range(40)]
    complete = content_hash(Dataset.from_list(rows))
    assert complete is not None and complete == content_hash(Dataset.from_list(rows).with_format("torch"))
    for changed in (0, 39):
        other = [*rows[:changed], {**rows[changed], "labels": [-100, 1]}, *rows[changed + 1 :]]
        assert content_hash(Dataset.from_list(other)) != complete
    assert content_hash(rows) is None
    assert content_hash(Dataset.from_list(rows).with_transform(lambda batch: batch)) is None  # which may be random


def test_how_a_stream_is_cut(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    tokenizer = write_tokenizer(tmp_path / "tokenizer")

    def of(length: int = 9, **changes: Any) -> str | None:
        recipe = DataRecipe(files=str(tmp_path / "corpus"), streaming=True, **changes)
        return content_hash(training_rows(recipe, tokenizer, length))

    assert of() == of() is not None
    assert len({of(), of(8), of(packing="best_fit"), of(long_documents="cut")}) == 4


ORDER: dict[str, Any] = {
    "rows_per_step": 4, "rows_per_epoch": 9, "sampler": "SequentialSampler", "seed": 1, "content": "a", "workers": None
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"rows_per_step": 8}, {"rows_per_epoch": 8}, {"sampler": "stream"}, {"seed": 2}, {"content": "b"},
        {"workers": [2, 4]},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_fact_of_the_order_is_compared(change: dict[str, Any]) -> None:
    check_order(ORDER, dict(ORDER), accumulation=2)
    with pytest.raises(ValueError, match=f"needs the {next(iter(change))} that it had, .* or set ignore_data_skip"):
        check_order({**ORDER, **change}, ORDER, accumulation=2)
