"""The documents that a recipe names, through the `datasets` library: local files or any dataset, stored or as a stream.

Whatever stops the reading ends in a message with the file, the line and the remedy.
"""

from __future__ import annotations

import contextlib
import glob
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet
from datasets import Dataset, IterableDataset, load_dataset

from .recipe import DataRecipe

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # of `datasets`; "text" for all other files
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
CHAT_COLUMNS = (["messages"], ["prompt", "completion"])


class DataError(ValueError):
    """Data that cannot be read or is not what the recipe says."""


class DocumentError(DataError):
    """A document that cannot be used; `index` is its number in the data, the first is 0."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(index, message)  # both, so that it can be pickled
        self.index, self.message = index, message

    def __str__(self) -> str:
        return f"document {self.index} of the data: {self.message}"


def load_documents(data: DataRecipe) -> Dataset | IterableDataset:
    """One document per row, in the columns `text`, `messages`, or `prompt` and `completion` (and `tools`).

    Raises:
        DataError: data that is not there, cannot be read, or has no such columns.
    """
    taken = {"split", "streaming"} & data.arguments.keys()
    if taken:
        raise DataError(f"data.arguments must leave out {', '.join(sorted(taken))}; say it in data itself")
    arguments = {"split": data.split, "streaming": data.streaming, **data.arguments}
    with explained(data):
        if data.dataset is not None:
            documents = load_dataset(data.dataset, **arguments)
        else:
            files = find_files(data)
            builder = _builder(files)
            if builder == "text":
                arguments = {"sample_by": "document", **arguments}
            if builder == "json" and data.streaming:
                _check_lines(files)
            documents = load_dataset(builder, data_files={data.split: [str(path) for path in files]}, **arguments)
        names = documents.column_names or list(next(iter(documents)))
        return _select(documents, names, data)


def _select(documents: Any, names: list[str], data: DataRecipe) -> Any:
    """The columns that the format reads, text under its own name."""
    if data.format == "text":
        if data.text_column not in names:
            hint = "; format: chat reads conversations" if {"messages", "prompt"} & set(names) else ""
            raise DataError(
                f"text_column must be one of {names}, the columns of {data.dataset or data.files}, "
                f"got {data.text_column!r}{hint}"
            )
        documents = documents.select_columns([data.text_column])
        return documents if data.text_column == "text" else documents.rename_column(data.text_column, "text")
    found = [columns for columns in CHAT_COLUMNS if set(columns) <= set(names)]
    if len(found) != 1:
        raise DataError(
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
        raise DataError(f"data.files must name files, folders or patterns with files, got {name!r}: none found")
    return files


def _builder(files: list[Path]) -> str:
    """`datasets`' name for the kind of the files."""
    builders: dict[str, Path] = {}
    for path in files:
        suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
        builders.setdefault(BUILDERS.get(suffix, "text"), path)
    if len(builders) > 1:
        found = ", ".join(f"{builder} ({path})" for builder, path in builders.items())
        raise DataError(f"data.files must be of one kind, got {found}; name them by a pattern such as 'folder/*.jsonl'")
    return next(iter(builders))


def _check_lines(files: list[Path]) -> None:
    """A stream of a JSON list can give other values than it holds: datasets 5.2 leaves mixed types encoded."""
    for path in files:
        with fsspec.open(path, "rb", compression="infer") as file:
            if file.read(1) == b"[":
                raise DataError(
                    f"data.streaming needs a JSON object in every line, got the list {path}; write it in lines, or "
                    "leave streaming out"
                )


@contextlib.contextmanager
def explained(data: DataRecipe) -> Iterator[None]:
    """DataError with the place and the remedy for whatever goes wrong with the documents."""
    try:
        yield
    except Exception as error:
        causes = list(_causes(error))
        if isinstance(error, DataError) and not isinstance(error, DocumentError):
            raise
        ours = next((cause for cause in causes if isinstance(cause, DataError)), None)
        if isinstance(ours, DocumentError):
            place = f"document {ours.index} of {data.dataset}" if data.files is None else _place(data, ours.index)
            raise DataError(f"{place}: {ours.message}") from error
        if ours is not None:
            raise ours from error
        text = f"{type(causes[-1]).__name__}: {_text(causes[-1])}"
        if data.dataset is None:
            message = _fault(data) or f"data.files {data.files} cannot be read: {text}"
        else:
            message = (
                f"dataset {data.dataset!r} cannot be read: {text}; check its name, data.arguments and the connection "
                "(a private one also needs `hf auth login`), or name local files in data.files"
            )
        raise DataError(message) from error


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that led to it: `datasets` wraps them in others that say little."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _place(data: DataRecipe, index: int) -> str:
    """The file, and the line or row, of a document."""
    files = find_files(data)
    builder = _builder(files)
    if builder == "text":
        return str(files[index]) if data.arguments.get("sample_by", "document") == "document" else f"document {index}"
    for path in files:
        if builder == "parquet":
            rows: Sequence[int] = range(pyarrow.parquet.ParquetFile(path).metadata.num_rows)
            word = "row"
        else:
            lines = [(number, line) for number, line in _lines(path) if line.strip()]
            if lines and lines[0][1].startswith(b"["):
                return f"document {index} from the start of {path}"
            rows, word = [number for number, _ in lines], "line"
        if index < len(rows):
            return f"{path}, {word} {rows[index]}"
        index -= len(rows)
    return f"document {index} from the end of {files[-1]}"


def _fault(data: DataRecipe) -> str | None:
    """Where the first file that cannot be read breaks off, and what to do."""
    files = find_files(data)
    builder = _builder(files)
    for path in files:
        check = {"json": _json_fault, "parquet": _parquet_fault, "text": _text_fault}[builder]
        try:
            fault = check(path)
        except (EOFError, OSError, zlib.error) as error:
            fault = f" cannot be read: {error}; write it anew or take it out of data.files"
        if fault is not None:
            return f"{path}{fault}"
    return None


def _json_fault(path: Path) -> str | None:
    empty = True
    for number, line in _lines(path):
        empty = empty and not line.strip()
        try:
            value = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            return (
                f", line {number + error.lineno - 1} is no JSON: {error.msg} (column {error.colno}); mend or remove it"
            )
        except UnicodeDecodeError as error:
            return f", line {number} is not UTF-8: {error}; mend or remove it"
        if not isinstance(value, dict) and (number > 1 or not isinstance(value, list)):
            return f", line {number} must be a JSON object, got {type(value).__name__}; mend or remove it"
    return " is empty; take it out of data.files" if empty else None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line); a file that holds one list of objects is one line."""
    with fsspec.open(path, "rb", compression="infer") as file:
        first = file.readline()
        if first.startswith(b"["):
            yield 1, first + file.read()
        elif first:
            yield 1, first
            yield from enumerate(file, start=2)


def _parquet_fault(path: Path) -> str | None:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        return f" is no whole Parquet file: {_text(error)}; write it anew or take it out of data.files"
    for group in range(file.num_row_groups):
        try:
            file.read_row_group(group)
        except (OSError, ValueError) as error:
            return (
                f", row group {group} of {file.num_row_groups} is corrupt: {_text(error)}; write the file anew or "
                "take it out of data.files"
            )
    return None if file.metadata.num_rows else " is empty; take it out of data.files"


def _text_fault(path: Path) -> str | None:
    for number, line in _lines(path):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return (
                f", line {number} is not UTF-8: {error}; mend it, take the file out of data.files, or set "
                "data.arguments.encoding, or data.arguments.encoding_errors: replace"
            )
    return None
