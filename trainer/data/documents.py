"""Documents of a recipe: local files, or any dataset of the `datasets` library, stored or streamed.

Every error names the place where reading stopped and the remedy.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from ..recipes.recipe import DataRecipe
from .files import OPTIONAL, SAMPLES, DataError, LocalFiles, expand, one_line

CHAT_COLUMNS = (["messages"], ["prompt", "completion"])
FILE_ARGUMENTS: dict[str, tuple[Callable[[Any], Any], str]] = {  # name -> (check that raises an error, valid values)
    "encoding": ("".encode, "a text encoding of Python, such as utf-8"),
    "encoding_errors": (codecs.lookup_error, "strict, replace, ignore or another error handler of Python"),
    "sample_by": (dict.fromkeys(SAMPLES).__getitem__, f"one of {', '.join(SAMPLES)}"),
}


def load_documents(data: DataRecipe) -> Dataset | IterableDataset | LocalFiles:
    """Return documents in the columns `text`, `messages`, or `prompt` and `completion` (and `tools`).

    Local files are read during iteration, with or without `data.streaming`.

    Raises:
        DataError: the data does not exist, cannot be read, or has no such columns.
    """
    with explained(data):
        if data.files is not None:
            _check_file_arguments(data.arguments)
            files = LocalFiles.of(expand(data.files), **data.arguments)
            columns = _columns(files.names(), data)
            if data.format == "chat":
                columns |= {name: name for name in OPTIONAL}
            return dataclasses.replace(files, columns=columns)
        documents = _load_dataset(data)
        columns = _columns(documents.column_names or list(next(iter(documents))), data)
        documents = documents.select_columns(list(columns.values()))
        return documents.rename_columns({old: new for new, old in columns.items() if new != old})


def _check_file_arguments(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if name not in FILE_ARGUMENTS:
            raise DataError(
                f"data.arguments with data.files must be {', '.join(FILE_ARGUMENTS)}, got {name!r}; for arguments of "
                "datasets' own readers write dataset: json (or parquet, text) and arguments: {data_files: ...}"
            )
        check, expected = FILE_ARGUMENTS[name]
        try:
            check(value)
        except (LookupError, TypeError) as error:
            raise DataError(f"data.arguments.{name} must be {expected}, got {value!r}") from error


def _load_dataset(data: DataRecipe) -> Any:
    taken = {"split", "streaming"} & data.arguments.keys()
    if taken:
        raise DataError(f"data.arguments must leave out {', '.join(sorted(taken))}; set it in data itself")
    assert data.dataset is not None
    if glob.has_magic(data.dataset) and Path(data.dataset).exists():
        raise DataError(
            f"data.dataset is a local folder whose name `datasets` takes for a pattern, got {data.dataset!r}; name it "
            "in data.files, or rename it without *, ? and ["
        )
    return load_dataset(data.dataset, split=data.split, streaming=data.streaming, **data.arguments)


def _columns(names: list[str], data: DataRecipe) -> dict[str, str]:
    """Return the columns that the format reads: name in training -> name in the data."""
    if data.format == "text":
        if data.text_column not in names:
            hint = "; format: chat reads conversations" if {"messages", "prompt"} & set(names) else ""
            raise DataError(
                f"text_column must be one of {names}, the columns of {data.dataset or data.files}, "
                f"got {data.text_column!r}{hint}"
            )
        return {"text": data.text_column}
    found = [columns for columns in CHAT_COLUMNS if set(columns) <= set(names)]
    if len(found) != 1:
        raise DataError(
            f"format: chat needs a column messages, or prompt and completion, got {names}; rename or remove columns"
        )
    return {name: name for name in [*found[0], *(OPTIONAL & set(names))]}


@contextlib.contextmanager
def explained(data: DataRecipe) -> Iterator[None]:
    """Turn any error into a DataError with the place and the remedy."""
    try:
        yield
    except Exception as error:
        causes: list[BaseException] = [error]  # `datasets` wraps errors in others that say little
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        if (known := next((cause for cause in causes if isinstance(cause, DataError)), None)) is not None:
            raise DataError(str(known)) from error
        text = f"{type(causes[-1]).__name__}: {one_line(causes[-1])}"
        if data.dataset is None:
            raise DataError(f"data.files {data.files} cannot be read: {text}") from error
        raise DataError(
            f"dataset {data.dataset!r} cannot be read: {text}; check its name, data.arguments and the connection "
            "(a private one also needs `hf auth login`), or name local files in data.files, which reads only the "
            "columns for training"
        ) from error
