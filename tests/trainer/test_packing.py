"""Packing against definitions token by token, and against brute force where rows are fitted."""

from __future__ import annotations

import random
from typing import Any

import pytest

from linear_llama3.trainer.data import packing
from linear_llama3.trainer.data.packing import best_fit, collate_documents, pack

PADDING = 0
ODD_SIZES = [0, 1, 8, 3, 0, 1, 1, 20, 7, 2, 16, 8, 5]  # empty, one token, exactly a row, several rows


def documents(sizes: list[int]) -> list[dict[str, list[int]]]:
    """Every token is another one; those that end in 3 or 7 are no targets."""
    tokens = iter(range(1, sum(sizes) + 1))
    found = []
    for size in sizes:
        ids = [next(tokens) for _ in range(size)]
        found.append({"input_ids": ids, "labels": [-100 if i % 10 in (3, 7) else i for i in ids]})
    return found


def packed(
    sizes: list[int], length: int, strategy: str, long_documents: str = "continue"
) -> list[dict[str, list[int]]]:
    rows = pack(documents(sizes), length=length, packing=strategy, long_documents=long_documents, padding=PADDING)
    return [{name: column.tolist() for name, column in row.items()} for row in rows]


def pieces(sizes: list[int], length: int, long_documents: str) -> list[list[int]]:
    """Return the kept parts of every document, of at most `length` tokens each."""
    found = []
    for document in documents(sizes):
        ids = document["input_ids"]
        for start in range(0, len(ids), length):
            if start == 0 or long_documents == "continue":
                found.append(ids[start : start + length])
    return found


def parts(row: dict[str, list[int]]) -> list[list[int]]:
    """The documents of a row as its positions tell them, without padding."""
    found: list[list[int]] = []
    for token, position in zip(row["input_ids"], row["position_ids"], strict=True):
        if position == 0:
            found.append([])
        assert position == len(found[-1])
        found[-1].append(token)
    return [part for part in found if part[0] != PADDING]


def assert_labels(row: dict[str, list[int]]) -> None:
    """Every token that is a target and has one before it in its document."""
    for token, label, position in zip(row["input_ids"], row["labels"], row["position_ids"], strict=True):
        nothing = token == PADDING or position == 0 or token % 10 in (3, 7)
        assert label == (-100 if nothing else token)


@pytest.mark.parametrize("long_documents", ["continue", "cut"])
@pytest.mark.parametrize("length", [2, 3, 8, 19])
def test_wrapped(length: int, long_documents: str) -> None:
    kept = [piece for piece in pieces(ODD_SIZES, length, long_documents)]
    complete = documents(ODD_SIZES)
    stream = [token for piece in kept for token in piece]
    first_ones = {document["input_ids"][0] for document in complete if document["input_ids"]}
    expected = []
    for start in range(0, len(stream) - length + 1, length):
        row: list[list[int]] = []
        for token in stream[start : start + length]:
            if not row or token in first_ones:
                row.append([])
            row[-1].append(token)
        if any(token % 10 not in (3, 7) for part in row for token in part[1:]):
            expected.append(row)
    rows = packed(ODD_SIZES, length, "wrapped", long_documents)
    assert [parts(row) for row in rows] == expected
    for found in rows:
        assert len(found["input_ids"]) == length
        assert_labels(found)


@pytest.mark.parametrize("window", [1, 256], ids=["many windows", "one window"])
@pytest.mark.parametrize("long_documents", ["continue", "cut"])
@pytest.mark.parametrize("length", [2, 3, 8, 19])
def test_best_fit_never_splits_a_piece(
    length: int, long_documents: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WINDOW", window)
    rows = packed(ODD_SIZES, length, "best_fit", long_documents)
    found = [part for row in rows for part in parts(row)]
    expected = pieces(ODD_SIZES, length, long_documents)
    assert all(part in expected for part in found) and len(found) == len({part[0] for part in found})
    for piece in expected:  # rows without a target are left out
        learnt = any(token % 10 not in (3, 7) for token in piece[1:])
        assert piece in found or not learnt, piece
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) == length
        assert [part[0] for part in parts(row)] == sorted(part[0] for part in parts(row)), "in the data's order"
        assert_labels(row)
    if window == 256:
        assert [parts(row)[0] for row in rows] == sorted(parts(row)[0] for row in rows)


@pytest.mark.parametrize("long_documents", ["continue", "cut"])
@pytest.mark.parametrize("length", [2, 3, 8, 19])
def test_one_document_a_row(length: int, long_documents: str) -> None:
    rows = packed(ODD_SIZES, length, "none", long_documents)
    expected = pieces(ODD_SIZES, length, long_documents)
    assert [row["input_ids"] for row in rows] == [
        piece for piece in expected if any(token % 10 not in (3, 7) for token in piece[1:])
    ]
    for row in rows:
        assert_labels(row)


def brute_force(lengths: list[int], capacity: int) -> list[int]:
    """Tokens in each row, by the definition of best fit decreasing."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [filled for filled in rows if filled + length <= capacity]
        if fitting:
            rows.remove(max(fitting))
        rows.append(max(fitting, default=0) + length)
    return sorted(rows)


def test_best_fit_is_its_definition() -> None:
    generator = random.Random(0)
    for _ in range(300):
        capacity = generator.randint(1, 30)
        lengths = [generator.randint(1, capacity) for _ in range(generator.randint(0, 40))]
        rows = best_fit(lengths, capacity)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert sorted(sum(lengths[index] for index in row) for row in rows) == brute_force(lengths, capacity)


@pytest.mark.parametrize("strategy", ["wrapped", "best_fit", "none"])
@pytest.mark.parametrize("sizes", [[], [0, 0], [1], [1, 0, 1]], ids=["none", "empty", "one token", "single tokens"])
def test_nothing_to_learn(sizes: list[int], strategy: str) -> None:
    assert packed(sizes, 4, strategy) == []


def test_one_document_of_exactly_a_row() -> None:
    for strategy in ("wrapped", "best_fit", "none"):
        (row,) = packed([4], 4, strategy)
        assert row == {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4], "position_ids": [0, 1, 2, 3]}
    (row,) = packed([3], 5, "best_fit")
    assert row == {"input_ids": [1, 2, 3, 0, 0], "labels": [-100, 2, -100, -100, -100], "position_ids": [0, 1, 2, 0, 1]}


def test_labels_are_the_tokens_by_default() -> None:
    (row,) = pack([{"input_ids": [3, 7, 5]}], length=3, packing="wrapped", long_documents="cut", padding=PADDING)
    assert row["labels"].tolist() == [-100, 7, 5]


def test_rows_of_different_lengths_are_filled_up() -> None:
    batch: dict[str, Any] = collate_documents(packed([2, 4], 8, "none"), padding=9)
    assert batch["input_ids"].tolist() == [[1, 2, 9, 9], [3, 4, 5, 6]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, 4, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
