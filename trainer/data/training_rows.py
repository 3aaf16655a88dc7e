"""Rows to train on: documents (documents.py) -> tokens (tokenization.py) -> rows (packing.py).

Rows keep the order of the data on any number of processes; the Trainer shuffles stored rows by its seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from ..recipes.recipe import DataRecipe
from .documents import explained, load_documents
from .files import DataError, LocalFiles
from .packing import ROW_FEATURES, pack
from .tokenization import tokenize

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
    source = {"documents": load_documents(data), "tokenizer": tokenizer, "name": data.dataset}
    choices = {
        "length": length,
        "packing": data.packing,
        "long_documents": data.long_documents,
        "padding": tokenizer.pad_token_id or 0,
    }
    if data.streaming:
        rows = IterableDataset.from_generator(
            _streamed_rows, gen_kwargs={"source": source, "choices": choices, "data": data}, features=ROW_FEATURES
        )
        rows.info.description = f"{choices}, {data.format}, a vocabulary of {len(tokenizer)}"  # a resume compares it
        return rows
    columns = ("input_ids",) if data.format == "text" else ("input_ids", "labels")
    with explained(data):
        tokens = Dataset.from_generator(
            _tokenized,
            gen_kwargs={**source, "version": CACHE_VERSION},
            features=Features({name: List(Value("int32")) for name in columns}),
        )
        arguments = {"documents": tokens.with_format("numpy"), "choices": choices, "version": CACHE_VERSION}
        return Dataset.from_generator(_rows, gen_kwargs=arguments, features=ROW_FEATURES)


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


def _tokenized(
    documents: Any, tokenizer: PreTrainedTokenizerBase, name: str | None, version: int
) -> Iterator[dict[str, list[int]]]:
    """Yield tokenized documents; `name` is that of their dataset, `version` is only part of the cache's key."""
    if isinstance(documents, LocalFiles):
        placed = documents.placed()
    else:
        placed = ((f"document {index} of {name}", document) for index, document in enumerate(documents))
    yield from tokenize(placed, tokenizer)


def _rows(documents: Iterable[Mapping[str, Any]], choices: dict[str, Any], version: int) -> Iterator[dict[str, Any]]:
    """Yield rows of tokenized documents; `version` is only part of the cache's key.

    Raises:
        DataError: the documents fill no row.
    """
    tokens, empty = 0, True

    def counted() -> Iterator[Mapping[str, Any]]:
        nonlocal tokens
        for document in documents:
            tokens += len(document["input_ids"])
            yield document

    for row in pack(counted(), **choices):
        empty = False
        yield row
    if empty:
        raise DataError(
            f"the data must fill at least one row of sequence_length = {choices['length']} tokens, got {tokens} "
            "tokens; add documents or shorten sequence_length"
        )


def _streamed_rows(source: dict[str, Any], choices: dict[str, Any], data: DataRecipe) -> Iterator[dict[str, Any]]:
    with explained(data):
        for row in _rows(_tokenized(**source, version=CACHE_VERSION), choices, CACHE_VERSION):
            yield {name: column.tolist() for name, column in row.items()}  # as stored rows are read
