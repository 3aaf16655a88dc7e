"""Documents in local files: JSON lines, Parquet or text, compressed or not.

A file is opened by its exact name, which is never read as a pattern or URL. Only the columns that training reads are
kept, with their values as written: no types are inferred.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import io
import json
import re
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
    folder = Path(name)
    if folder.is_file():
        return [folder]
    if folder.is_dir():
        paths = [path for path in folder.rglob("*") if not re.search(r"(^|/)\.", path.relative_to(folder).as_posix())]
    else:
        paths = [Path(path) for path in glob.glob(name, recursive=True)]
    files = sorted(path for path in paths if path.is_file())
    if not files:
        raise DataError(
            f"{source} must name files, folders or patterns with files, got {name!r}: none found (hidden files must be "
            "named)"
        )
    return files


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
        return (record for _, record in self.placed())

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
                    with opened(path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
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
            raise DataError(
                f"{path}, line {self._undecodable_line(path)} is not {self.encoding.upper()}: {error.reason}; correct "
                "it, take the file out of the data, or set data.arguments.encoding, or data.arguments.encoding_errors: "
                "replace"
            ) from error
        except Exception as error:  # from the file system, a decompressor, a parser
            raise DataError(
                f"{path} cannot be read: {one_line(error)}; write the file again or take it out of the data"
            ) from error

    def _json(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the objects of JSON lines, or of a file that holds one list of objects or one object."""
        with self._lines(path) as lines:
            first = True
            for number, line in enumerate(lines, start=1):
                line = line.strip(f"{BOM} \t\r\n")
                if not line:
                    continue
                if first and (line.startswith("[") or line == "{"):  # one value of several lines
                    line += "\n" + lines.read()
                listed, first = first and line.startswith("["), False
                value = self._parsed(line, path, number)
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
        except (ValueError, RecursionError) as error:
            # not only bad syntax: also a number of thousands of digits, or a thousand lists in a list
            if isinstance(error, json.JSONDecodeError):
                number, problem = number + error.lineno - 1, f"is not JSON: {error.msg} (column {error.colno})"
            else:
                problem = f"cannot be read: {one_line(error)}"
            raise DataError(f"{path}, line {number} {problem}; correct or remove it") from error
        if self.encoding_errors == "strict" or "\\u" not in text:
            return value
        return json.loads(json.dumps(value, ensure_ascii=False).encode(errors=self.encoding_errors))

    def _parquet(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        with opened(path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            names, wanted = file.schema_arrow.names, set(self.columns.values())
            if missing := wanted - OPTIONAL - set(names):
                raise DataError(f"{path} needs the columns {', '.join(sorted(missing))}, got {names}")
            batches = file.iter_batches(BATCH, columns=sorted(wanted & set(names)))
            rows = (record for batch in batches for record in batch.to_pylist())
            yield from ((f", row {number}", record) for number, record in enumerate(rows))

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

    def _undecodable_line(self, path: Path) -> int:
        """Return the number of the line in the error, which the error does not know."""
        decoder, number = codecs.getincrementaldecoder(self.encoding)(self.encoding_errors), 0
        with opened(path) as file, contextlib.suppress(UnicodeDecodeError):
            for line in file:
                number += 1
                decoder.decode(line)
        return number


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


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
