"""From documents of tokens to rows: end to end, by best fit, or one by one.

A row that holds several documents tells them by `position_ids` that restart. Padding is a document of its own.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Features, List, Value

from ...ops.cross_entropy import IGNORE_INDEX

ROW_FEATURES = Features({name: List(Value("int32")) for name in ("input_ids", "labels", "position_ids")})
WINDOW = 256  # rows' worth of tokens that best fit looks at together: what a stream holds in memory


class Piece(NamedTuple):
    """A document, or a part of one that is a document of its own."""

    ids: np.ndarray  # [n]
    labels: np.ndarray  # [n]; the first is nobody's target


def pack(
    documents: Iterable[Mapping[str, Any]], *, length: int, packing: str, long_documents: str, padding: int
) -> Iterator[dict[str, Any]]:
    """Rows of `length` tokens, or of at most so many if `packing` is "none"; see `DataRecipe`.

    "wrapped" leaves out the last tokens, too few for a row; the others fill rows up with `padding`. Rows without a
    target are left out.

    Args:
        documents: `input_ids`, and `labels` unless all tokens are targets.
    """
    whole = (_piece(document, length if long_documents == "cut" else None) for document in documents)
    if packing == "wrapped":
        rows = _wrapped(whole, length)
    else:
        pieces = (part for document in whole for part in _parts(document, length))
        rows = _windows(pieces, length) if packing == "best_fit" else ([piece] for piece in pieces)
    for row in rows:
        if any((piece.labels[1:] != IGNORE_INDEX).any() for piece in row):
            yield _row(row, length if packing != "none" else 0, padding)


def collate_whole(rows: Sequence[Mapping[str, Any]], padding: int) -> dict[str, torch.Tensor]:
    """A batch `[B, T]` of rows that are a document each, filled up on the right to the longest."""
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
    """Documents follow each other in their order; what does not fit a row continues in the next one."""
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
    window: list[Piece] = []
    tokens = 0
    for piece in pieces:
        window.append(piece)
        tokens += len(piece.ids)
        if tokens >= WINDOW * length:
            yield from _fitted(window, length)
            window, tokens = [], 0
    yield from _fitted(window, length)


def _fitted(pieces: list[Piece], length: int) -> Iterator[list[Piece]]:
    for row in best_fit([len(piece.ids) for piece in pieces], length):
        yield [pieces[index] for index in row]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the documents of each row: the longest first, each into the fullest row that has room for it.

    Best-fit-decreasing bin packing, as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830); at most
    11/9 of the fewest rows possible, and one more. Documents of a row, and rows by their first one, keep their order.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # space left -> rows
    spaces: list[int] = []  # keys of open_rows, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect_left(spaces, lengths[index])
        if at < len(spaces):
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        space -= lengths[index]
        if space and space not in open_rows:
            open_rows[space] = []
            insort(spaces, space)
        if space:
            open_rows[space].append(row)
    return sorted(sorted(row) for row in rows)


def _row(pieces: list[Piece], length: int, padding: int) -> dict[str, Any]:
    labels = [piece.labels.copy() for piece in pieces]
    for part in labels:
        part[0] = IGNORE_INDEX  # what stands before belongs to another document
    ids = [piece.ids for piece in pieces]
    missing = length - sum(map(len, ids))
    if missing > 0:
        ids.append(np.full(missing, padding, dtype=np.int32))
        labels.append(np.full(missing, IGNORE_INDEX, dtype=np.int32))
    positions = [np.arange(len(part), dtype=np.int32) for part in ids]
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: np.concatenate(parts) for name, parts in columns.items()}
