"""Rows of tokenized documents: concatenated and cut, packed by best fit, or one document per row.

`position_ids` restart at every document of a row. Padding forms a separate document.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Features, List, Value

from ...ops.cross_entropy import IGNORE_INDEX

ROW_FEATURES = Features({name: List(Value("int32")) for name in ("input_ids", "labels", "position_ids")})
WINDOW = 256  # best fit packs this number of rows at a time: a stream holds their tokens in memory


class Piece(NamedTuple):
    """A document, or a part of a long document that is treated as a separate document."""

    ids: np.ndarray  # [n]
    labels: np.ndarray  # [n]; the first is never a target


def pack(
    documents: Iterable[Mapping[str, Any]], *, length: int, packing: str, long_documents: str, padding: int
) -> Iterator[dict[str, Any]]:
    """Yield rows of `length` tokens, or of at most `length` tokens if `packing` is "none"; see `DataRecipe`.

    "wrapped" drops the last tokens if they do not fill a row; "best_fit" fills rows with `padding`. Rows without a
    target are dropped.

    Args:
        documents: `input_ids`, and `labels` unless all tokens are targets.
    """
    cut = (_piece(document, length if long_documents == "cut" else None) for document in documents)
    if packing == "wrapped":
        rows = _wrapped(cut, length)
    else:
        pieces = (part for document in cut for part in _parts(document, length))
        rows = _windows(pieces, length) if packing == "best_fit" else ([piece] for piece in pieces)
    for row in rows:
        if any((piece.labels[1:] != IGNORE_INDEX).any() for piece in row):
            yield _row(row, length if packing != "none" else 0, padding)


def collate_documents(rows: Sequence[Mapping[str, Any]], padding: int) -> dict[str, torch.Tensor]:
    """Return a batch `[B, T]` of rows with one document each, padded on the right to the longest row."""
    length = max(len(row["input_ids"]) for row in rows)

    def batch(values: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*value, *[fill] * (length - len(value))] for value in values])

    return {
        "input_ids": batch([row["input_ids"] for row in rows], padding),
        "labels": batch([row["labels"] for row in rows], IGNORE_INDEX),
        "attention_mask": batch([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def _piece(document: Mapping[str, Any], limit: int | None) -> Piece:
    ids = np.asarray(document["input_ids"], dtype=np.int32)[:limit]
    labels = document.get("labels")
    return Piece(ids, ids if labels is None else np.asarray(labels, dtype=np.int32)[:limit])


def _parts(document: Piece, length: int) -> Iterator[Piece]:
    for start in range(0, len(document.ids), length):
        yield Piece(document.ids[start : start + length], document.labels[start : start + length])


def _wrapped(documents: Iterable[Piece], length: int) -> Iterator[list[Piece]]:
    """Concatenate documents in their order and cut them into rows."""
    row: list[Piece] = []
    space = length
    for ids, labels in documents:
        start = 0
        while start < len(ids):
            row.append(Piece(ids[start : start + space], labels[start : start + space]))
            start += space
            space -= len(row[-1].ids)
            if space == 0:
                yield row
                row, space = [], length


def _windows(pieces: Iterable[Piece], length: int) -> Iterator[list[Piece]]:
    """Pack the pieces of one window after another by best fit."""
    window: list[Piece] = []
    tokens = 0
    for piece in chain(pieces, [None]):
        if piece is not None:
            window.append(piece)
            tokens += len(piece.ids)
        if piece is None or tokens >= WINDOW * length:
            for row in best_fit([len(piece.ids) for piece in window], length):
                yield [window[index] for index in row]
            window, tokens = [], 0


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the indices of the documents in each row: the longest first, each in the fullest row with enough space.

    Best-fit-decreasing bin packing, as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830): it needs
    at most 11/9 of the fewest possible rows, plus one. Documents in a row keep their order, and so do rows by their
    first document.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (space left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect_left(open_rows, (lengths[index], 0))
        if at < len(open_rows):
            space, row = open_rows.pop(at)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if space > lengths[index]:
            insort(open_rows, (space - lengths[index], row))
    return sorted(sorted(row) for row in rows)


def _row(pieces: list[Piece], length: int, padding: int) -> dict[str, Any]:
    labels = [piece.labels.copy() for piece in pieces]
    for part in labels:
        part[0] = IGNORE_INDEX  # the preceding token belongs to another document
    ids = [piece.ids for piece in pieces]
    missing = length - sum(map(len, ids))
    if missing > 0:
        ids.append(np.full(missing, padding, dtype=np.int32))
        labels.append(np.full(missing, IGNORE_INDEX, dtype=np.int32))
    positions = [np.arange(len(part), dtype=np.int32) for part in ids]
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: np.concatenate(parts) for name, parts in columns.items()}
