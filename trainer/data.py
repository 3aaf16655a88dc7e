"""The rows that a recipe trains on, through the `datasets` library: local files or any dataset, stored or as a stream.

documents (here) -> tokens (tokenization.py) -> rows (packing.py). The order is that of the data, whatever the number of
processes; the Trainer shuffles the rows of stored data by its seed.
"""

from __future__ import annotations

import contextlib
import glob
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

from .packing import ROW_FEATURES, empty_row, pack
from .recipe import DataRecipe
from .tokenization import tokenize

BATCH = 100  # documents that are tokenized together
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # of `datasets`; "text" for all other files
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
CHAT_COLUMNS = (["messages"], ["prompt", "completion"])


def training_rows(
    data: DataRecipe, tokenizer: PreTrainedTokenizerBase, length: int, multiple: int = 1
) -> Dataset | IterableDataset:
    """Rows of at most `length` tokens: `input_ids`, `labels`, and, where documents share rows, `position_ids` that
    restart at every document.

    Args:
        multiple: rows of an optimizer step. Rows without a label make the number of rows a multiple of it; else
            the last step of an epoch would see some rows twice, others on another number of processes.

    Raises:
        ValueError: data that is not there, cannot be read, is not what the recipe says, or fills no row.
    """
    documents, padding = load_documents(data), tokenizer.pad_token_id or 0
    choices = {
        "length": length,
        "packing": data.packing,
        "long_documents": data.long_documents,
        "padding": padding,
    }
    empty = empty_row(length if data.packing != "none" else 1, padding)
    if isinstance(documents, IterableDataset):
        arguments = {"documents": documents, "choices": choices, "data": data, "tokenizer": tokenizer}
        arguments |= {"multiple": multiple, "empty": empty}
        return IterableDataset.from_generator(_streamed_rows, gen_kwargs=arguments, features=ROW_FEATURES)
    tokens = documents.map(
        tokenize,
        fn_kwargs={"tokenizer": tokenizer},
        with_indices=True,
        batched=True,
        batch_size=BATCH,
        remove_columns=documents.column_names,
        desc="Tokenizing",
    )
    arguments = {"documents": tokens, "choices": choices}
    rows = Dataset.from_generator(_stored_rows, gen_kwargs=arguments, features=ROW_FEATURES)
    if not len(rows):
        raise ValueError(_nothing(length, sum(len(document["input_ids"]) for document in tokens)))
    missing = -len(rows) % multiple
    if not missing:
        return rows
    return concatenate_datasets([rows, Dataset.from_list([empty] * missing, features=ROW_FEATURES)])


def _stored_rows(documents: Dataset, choices: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from pack(documents.with_format("numpy"), **choices)


def _streamed_rows(
    documents: IterableDataset,
    choices: dict[str, Any],
    data: DataRecipe,
    tokenizer: PreTrainedTokenizerBase,
    multiple: int,
    empty: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    number = tokens = 0

    def tokenized() -> Iterator[dict[str, Any]]:
        nonlocal tokens
        for batch, indices in _batches(documents, data):
            columns = tokenize(batch, indices, tokenizer=tokenizer)
            for values in zip(*columns.values(), strict=True):
                document = dict(zip(columns, values, strict=True))
                tokens += len(document["input_ids"])
                yield document

    for row in pack(tokenized(), **choices):
        number += 1
        yield row
    if not number:
        raise ValueError(_nothing(choices["length"], tokens))
    yield from [empty] * (-number % multiple)


def _batches(documents: IterableDataset, data: DataRecipe) -> Iterator[tuple[dict[str, list], list[int]]]:
    """Columns of `BATCH` documents and their numbers."""
    with _explained(data):
        stream, first = iter(documents), 0
        while batch := list(islice(stream, BATCH)):
            yield {name: [row[name] for row in batch] for name in batch[0]}, list(range(first, first + len(batch)))
            first += len(batch)


def _nothing(length: int, tokens: int) -> str:
    return (
        f"the data must fill at least one row of sequence_length = {length} tokens, got {tokens} tokens; "
        "add documents or shorten sequence_length"
    )


def load_documents(data: DataRecipe) -> Dataset | IterableDataset:
    """One document per row, in the columns `text`, `messages`, or `prompt` and `completion` (and `tools`)."""
    taken = {"split", "streaming"} & data.arguments.keys()
    if taken:
        raise ValueError(f"data.arguments must leave out {', '.join(sorted(taken))}; say it in data itself")
    arguments = {"split": data.split, "streaming": data.streaming, **data.arguments}
    with _explained(data):
        if data.dataset is not None:
            documents = load_dataset(data.dataset, **arguments)
        else:
            files = find_files(data)
            builder = _builder(files)
            if builder == "text":
                arguments = {"sample_by": "document", "encoding_errors": "replace", **arguments}
            documents = load_dataset(builder, data_files={data.split: [str(path) for path in files]}, **arguments)
        names = documents.column_names or list(next(iter(documents), {}))
    return _select(documents, names, data)


def _select(documents: Any, names: list[str], data: DataRecipe) -> Any:
    """The columns that the format reads, text under its own name."""
    if data.format == "text":
        if data.text_column not in names:
            hint = "; format: chat reads conversations" if {"messages", "prompt"} & set(names) else ""
            raise ValueError(
                f"text_column must be a column of {data.dataset or data.files}, one of {names}, "
                f"got {data.text_column!r}{hint}"
            )
        documents = documents.select_columns([data.text_column])
        return documents if data.text_column == "text" else documents.rename_column(data.text_column, "text")
    found = [columns for columns in CHAT_COLUMNS if set(columns) <= set(names)]
    if len(found) != 1:
        raise ValueError(
            f"format: chat needs a column messages, or prompt and completion, got {names}; rename or remove columns"
        )
    return documents.select_columns([*found[0], *({"tools"} & set(names))])


def find_files(data: DataRecipe) -> list[Path]:
    """The files that `data.files` names; sorted within each name."""
    assert data.files is not None
    names = [data.files] if isinstance(data.files, str) else data.files
    return [path for name in names for path in _expand(name)]


def _expand(name: str) -> list[Path]:
    """A file, all files below a folder, or the files that match a pattern; sorted."""
    path = Path(name)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())
    if not files:
        raise ValueError(f"data.files must name files, folders or patterns with files, got {name!r}: none found")
    return files


def _builder(files: list[Path]) -> str:
    """`datasets`' name for the kind of the files."""
    builders: dict[str, Path] = {}
    for path in files:
        suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
        builders.setdefault(BUILDERS.get(suffix, "text"), path)
    if len(builders) > 1:
        found = ", ".join(f"{builder} ({path})" for builder, path in builders.items())
        raise ValueError(
            f"data.files must be of one kind, got {found}; name them by a pattern such as 'folder/*.jsonl'"
        )
    return next(iter(builders))


@contextlib.contextmanager
def _explained(data: DataRecipe) -> Iterator[None]:
    """ValueError with the place and the remedy for whatever stops the reading of documents."""
    try:
        yield
    except Exception as error:
        if data.dataset is None:
            files = find_files(data)
            message = _corruption(files, _builder(files)) or f"data.files {data.files} cannot be read: {_text(error)}"
        else:
            message = (
                f"dataset {data.dataset!r} cannot be read: {_text(error)}; check its name, data.arguments and the "
                "connection (a private one also needs `hf auth login`), or name local files in data.files"
            )
        raise ValueError(message) from error


def _text(error: BaseException) -> str:
    """The error that began it: `datasets` wraps others in one that says little."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".strip()


def _corruption(files: list[Path], builder: str) -> str | None:
    """Where the first file is corrupt, and what to do."""
    for path in files:
        if builder == "json" and (place := _corrupt_line(path)) is not None:
            return f"{path}, {place}; mend or remove it"
        if builder == "parquet" and (place := _corrupt_row_group(path)) is not None:
            return f"{path}, {place}; write the file anew or take it out of data.files"
    return None


def _corrupt_line(path: Path) -> str | None:
    with fsspec.open(path, compression="infer") as file:
        first = file.read(1)
        lines: Any = [first + file.read()] if first == b"[" else _lines(first, file)
        for number, line in enumerate(lines, start=1):
            try:
                value = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                return f"line {number + error.lineno - 1} is no JSON: {error.msg} (column {error.colno})"
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8: {error}"
            if not isinstance(value, dict) and first != b"[":
                return f"line {number} must be a JSON object, got {type(value).__name__}"
    return None


def _lines(first: bytes, file: Any) -> Iterator[bytes]:
    yield first + file.readline()
    yield from file


def _corrupt_row_group(path: Path) -> str | None:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        return f"which is no whole Parquet file: {error}"
    for group in range(file.num_row_groups):
        try:
            file.read_row_group(group)
        except (OSError, ValueError) as error:
            return f"row group {group} of {file.num_row_groups} is corrupt: {str(error).strip()}"
    return None
