"""Rows to train on: documents (documents.py) -> tokens (tokenization.py) -> rows (packing.py).

Rows keep the order of the data on any number of processes; the Trainer shuffles stored rows by its seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from ..recipes.recipe import DataRecipe
from .documents import explained, load_documents
from .files import DataError
from .packing import ROW_FEATURES, pack
from .tokenization import tokenize

BATCH = 100  # documents that are tokenized together
CACHE_VERSION = 1
"""Part of the cache's key: raise it when files.py, tokenization.py or packing.py make other tokens or rows of the same
documents. `datasets` itself compares only the names of functions."""


def training_rows(data: DataRecipe, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset | IterableDataset:
    """Return rows of at most `length` tokens: `input_ids`, `labels`, and `position_ids` that restart at every document.

    Stored rows and their tokens are kept in the cache of `datasets`.

    Raises:
        DataError: a ValueError; the data does not exist, cannot be read, does not fit the recipe, or fills no row. A
            stream raises it when it reaches the place.
    """
    documents = load_documents(data)
    choices = {
        "length": length,
        "packing": data.packing,
        "long_documents": data.long_documents,
        "padding": tokenizer.pad_token_id or 0,
    }
    if data.streaming:
        arguments = {"documents": documents, "choices": choices, "data": data, "tokenizer": tokenizer}
        rows = IterableDataset.from_generator(_streamed_rows, gen_kwargs=arguments, features=ROW_FEATURES)
        rows.info.description = f"{choices}, {data.format}, a vocabulary of {len(tokenizer)}"  # a resume compares it
        return rows
    columns = ("input_ids",) if data.format == "text" else ("input_ids", "labels")
    with explained(data):
        tokens = Dataset.from_generator(
            _tokenized,
            gen_kwargs={"documents": documents, "tokenizer": tokenizer, "version": CACHE_VERSION},
            features=Features({name: List(Value("int32")) for name in columns}),
        )
    if next(_stored_rows(tokens, choices, CACHE_VERSION), None) is None:
        raise DataError(_nothing(length, sum(len(document["input_ids"]) for document in tokens)))
    arguments = {"documents": tokens, "choices": choices, "version": CACHE_VERSION}
    return Dataset.from_generator(_stored_rows, gen_kwargs=arguments, features=ROW_FEATURES)


def without_share(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split rows into rows to train on and a random share to validate on, each in their original order.

    Raises:
        DataError: no rows would be left to train on.
    """
    count = max(round(share * len(rows)), 1)
    if count >= len(rows):
        raise DataError(f"validation.share must leave rows to train on, got {share} of {len(rows)} rows; add documents")
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[np.random.default_rng(seed).choice(len(rows), count, replace=False)] = True
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))


def _tokenized(documents: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, version: int) -> Iterator[Any]:
    """Yield tokenized documents; `version` is only part of the cache's key."""
    for batch, indices in _batches(documents):
        columns = tokenize(batch, indices, tokenizer=tokenizer)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _stored_rows(documents: Dataset, choices: dict[str, Any], version: int) -> Iterator[dict[str, Any]]:
    yield from pack(documents.with_format("numpy"), **choices)


def _streamed_rows(
    documents: Iterable[dict[str, Any]], choices: dict[str, Any], data: DataRecipe, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    tokens = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal tokens
        for document in _tokenized(documents, tokenizer, CACHE_VERSION):
            tokens += len(document["input_ids"])
            yield document

    empty = True
    with explained(data):
        for row in pack(counted(), **choices):
            empty = False
            yield {name: column.tolist() for name, column in row.items()}  # as stored rows are read
    if empty:
        raise DataError(_nothing(choices["length"], tokens))


def _batches(documents: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, list], list[int]]]:
    """Yield the columns of `BATCH` documents, and the numbers of these documents."""
    stream, first = iter(documents), 0
    while batch := list(islice(stream, BATCH)):
        yield {name: [row[name] for row in batch] for name in batch[0]}, list(range(first, first + len(batch)))
        first += len(batch)


def _nothing(length: int, tokens: int) -> str:
    return (
        f"the data must fill at least one row of sequence_length = {length} tokens, got {tokens} tokens; "
        "add documents or shorten sequence_length"
    )
