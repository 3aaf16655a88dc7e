"""Lengths of rows, of any kind of stored data."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest

from linear_llama3.trainer.adaptive.planned_steps import row_lengths

ROWS = [{"input_ids": [*range(n)], "labels": [*range(n)]} for n in (5, 0, 3, 8, 1, 2, 9, 4)]
STORED = datasets.Dataset.from_list(ROWS)
DATA: dict[str, Any] = {
    "list": ROWS,
    "stored": STORED,
    "in torch's format": STORED.with_format("torch"),
    "in chunks": datasets.concatenate_datasets([STORED, STORED.select([6, 6])]),
    "shuffled": STORED.shuffle(seed=1),
    "filtered": STORED.filter(lambda row: len(row["input_ids"]) > 2),
    "a slice": STORED.select(range(2, 5)),
    "a part of a shuffled one": STORED.shuffle(seed=1).select([7, 0, 0]),
    "none": STORED.select([]),
}


@pytest.mark.parametrize("name", DATA)
def test_lengths_of_rows(name: str) -> None:
    lengths = row_lengths(DATA[name], progress=False)
    assert lengths.dtype == np.int64
    assert lengths.tolist() == [len(row["input_ids"]) for row in DATA[name]]


def test_a_row_without_tokens_at_all() -> None:
    assert row_lengths(datasets.Dataset.from_dict({"input_ids": [[1, 2], None, [3]]}), progress=False).tolist() == [
        2,
        0,
        1,
    ]


def test_tokens_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.Dataset, "_getitem", lambda *args, **kwargs: pytest.fail("rows were read"))
    assert row_lengths(DATA["shuffled"], progress=False).sum() == 32
