"""Documents in local files: JSON lines, Parquet or text, compressed or not.

A file is opened by its exact name, which is never read as a pattern or URL. Only the columns that training reads are
kept, with their values as written: no types are inferred.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet
from fsspec.compression import compr

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}  # "text" for all other files
COMPRESSION = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}  # fsspec's names
BOM = "\ufeff"
OPTIONAL = {"tools"}  # columns that a record may lack
SAMPLES = ("document", "paragraph", "line")  # units of a text file that become documents
BATCH = 100  # rows of Parquet that are read together


class DataError(ValueError):
    """Data that cannot be read or is not what the recipe says."""


class DocumentError(DataError):
    """A document that cannot be used; `index` is its number in the data, the first is 0."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(index, message)  # both, so that it can be pickled
        self.index, self.message = index, message

    def __str__(self) -> str:
        return f"document {self.index} of the data: {self.message}"


def expand(names: str | list[str], source: str = "data.files") -> list[Path]:
    """Return the files of names, sorted within each name: a file, a folder (all files below it) or a pattern.

    Folders and patterns skip hidden files, and files in hidden folders, unless they name them.

    Args:
        source: the setting or argument that holds the names, for messages.
    """
    names = [names] if isinstance(names, str) else names
    if not all(names) or not names:  # "" would be the current folder
        raise DataError(f"{source} must name files, folders or patterns with files, got {names}; name them")
    return [path for name in names for path in _expand(name, source)]


def _expand(name: str, source: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())
    if not files:
        raise DataError(
            f"{source} must name files, folders or patterns with files, got {name!r}: none found (hidden files must be "
            "named)"
        )
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFiles:
    """The records of a list of files, in order.

    - `versions`: modification time [ns] and size [bytes] of each file, part of the cache's key.
    - `columns`: column name in training -> name in the files.
    - `encoding`, `encoding_errors`: for JSON and text, as for Python's `open`.
    - `sample_by`: the unit of a text file that becomes a document: the file ("document"), a paragraph or a line.
    """

    paths: tuple[Path, ...]
    versions: tuple[tuple[int, int], ...]
    kind: str
    columns: dict[str, str]
    encoding: str = "utf-8"
    encoding_errors: str = "strict"
    sample_by: str = "document"

    @classmethod
    def of(cls, paths: list[Path], **options: Any) -> LocalFiles:
        """Describe files as they are now; no columns are selected yet."""
        versions = tuple((stat.st_mtime_ns, stat.st_size) for stat in map(Path.stat, paths))
        return cls(paths=tuple(paths), versions=versions, kind=_kind(paths), columns={}, **options)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _, record in self.placed():
            yield record

    def placed(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (file and line or row, record).

        Raises:
            DataError: a file cannot be read; the message gives the place and the remedy.
        """
        read = {"json": self._json, "parquet": self._parquet, "text": self._text}[self.kind]
        for path in self.paths:
            with self._reading(path):
                for place, record in read(path):
                    yield f"{path}{place}", {name: record.get(column) for name, column in self.columns.items()}

    def names(self) -> list[str]:
        """Return the columns of the first record; raise DataError if there is none or a file cannot be read."""
        if self.kind == "text":
            return ["text"]
        for path in self.paths:
            with self._reading(path):
                if self.kind == "json":
                    for _, record in self._json(path):
                        return list(record)
                else:
                    with _parquet_file(path) as file:
                        if file.metadata.num_rows:
                            return file.schema_arrow.names
        raise DataError(f"{self.paths[0]} is empty; take it out of the data")

    @contextlib.contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except UnicodeDecodeError as error:
            raise DataError(f"{path}{self._not_decoded(path, error)}") from error
        except Exception as error:  # from the file system, a decompressor, a parser
            raise DataError(f"{path} cannot be read: {one_line(error)}; {_REPLACE}") from error

    def _json(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the objects of JSON lines, or of a file that holds one list of objects or one object."""
        with self._lines(path) as lines:
            first = True
            for number, line in enumerate(lines, start=1):
                line = line.strip(f"{BOM} \t\r\n")
                if not line:
                    continue
                one_value, first = first and (line.startswith("[") or line == "{"), False
                value = self._parsed(line + "\n" + lines.read() if one_value else line, path, number)
                listed = one_value and isinstance(value, list)
                for index, record in enumerate(value if listed else [value]):
                    place = f", object {index} of the list" if listed else f", line {number}"
                    if not isinstance(record, dict):
                        raise DataError(
                            f"{path}{place} must be a JSON object, got {type(record).__name__}; correct or remove it"
                        )
                    yield place, record

    def _parsed(self, text: str, path: Path, number: int) -> Any:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number + error.lineno - 1} is not JSON: {error.msg} (column {error.colno}); "
                "correct or remove it"
            ) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand lists in a list
            raise DataError(f"{path}, line {number} cannot be read: {one_line(error)}; correct or remove it") from error
        if self.encoding_errors == "strict" or "\\u" not in text:
            return value
        return json.loads(json.dumps(value, ensure_ascii=False).encode(errors=self.encoding_errors))

    def _parquet(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        rows = itertools.count()
        with _parquet_file(path) as file:
            names = file.schema_arrow.names
            missing = set(self.columns.values()) - set(names)
            if missing - OPTIONAL:
                raise DataError(f"{path} needs the columns {', '.join(sorted(missing - OPTIONAL))}, got {names}")
            columns = sorted(set(self.columns.values()) - missing)
            for group in range(file.num_row_groups):
                try:
                    for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns):
                        yield from ((f", row {next(rows)}", record) for record in batch.to_pylist())
                except (OSError, ValueError) as error:
                    raise DataError(
                        f"{path}, row group {group} of {file.num_row_groups} is corrupt: {one_line(error)}; {_REPLACE}"
                    ) from error

    def _text(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        with self._lines(path) as lines:
            if self.sample_by == "line":
                for number, line in enumerate(lines, start=1):
                    yield f", line {number}", {"text": line.removeprefix(BOM if number == 1 else "").rstrip("\n")}
                return
            text = lines.read().removeprefix(BOM)
        if self.sample_by == "document":
            yield "", {"text": text}
        else:
            paragraphs = filter(None, text.split("\n\n"))
            yield from ((f", paragraph {number}", {"text": part}) for number, part in enumerate(paragraphs, start=1))

    @contextlib.contextmanager
    def _lines(self, path: Path) -> Iterator[io.TextIOWrapper]:
        with opened(path) as file, io.TextIOWrapper(file, self.encoding, self.encoding_errors) as lines:  # type: ignore[type-var]
            yield lines

    def _not_decoded(self, path: Path, error: UnicodeDecodeError) -> str:
        """Describe the error with its line number, which the error does not know."""
        decoder, lines = codecs.getincrementaldecoder(self.encoding)(self.encoding_errors), 0
        with opened(path) as file, contextlib.suppress(UnicodeDecodeError):
            for line in file:
                lines += 1
                decoder.decode(line)
        return (
            f", line {lines} is not {self.encoding.upper()}: {error.reason}; correct it, take the file out of "
            "the data, or set data.arguments.encoding, or data.arguments.encoding_errors: replace"
        )


_REPLACE = "write the file again or take it out of the data"


def _kind(paths: list[Path]) -> str:
    kinds: dict[str, Path] = {}
    for path in paths:
        name = Path(path.name.lower())
        suffix = name.with_suffix("").suffix if name.suffix in COMPRESSION else name.suffix
        kinds.setdefault(KINDS.get(suffix, "text"), path)
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({path})" for kind, path in kinds.items())
        raise DataError(f"all files must be of one kind, got {found}; name them by a pattern such as 'folder/*.jsonl'")
    return next(iter(kinds))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file as bytes, decompressed."""
    name = COMPRESSION.get(path.suffix.lower())
    if name is not None and name not in compr:
        raise DataError(f"{path} needs a package that reads {name}; pip install zstandard, or decompress the file")
    with path.open("rb") as raw:
        if name is None:
            yield raw
        else:
            with compr[name](raw, mode="rb") as file:
                yield io.BufferedReader(file)


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    with opened(path) as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not a complete Parquet file: {one_line(error)}; {_REPLACE}") from error
        yield parquet


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
