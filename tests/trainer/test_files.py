"""Local files are read by their exact names, only the columns of the format, with values as written."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from linear_llama3.trainer.data.documents import load_documents
from linear_llama3.trainer.data.files import DataError, expand
from linear_llama3.trainer.data.training_rows import training_rows
from linear_llama3.trainer.recipes.recipe import DataRecipe
from tests.helpers.recipes import write_tokenizer

both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
NAMES = ["a[1]", "a*", "a?", "a::b", "file::b", "zip::b", "hf:", "a{b}", "a#b%20", "~a", "-", "'a b'"]  # next to a1


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache") / "[1]*")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def as_text(text: str) -> bytes:
    return text.encode()


def as_lines(text: str) -> bytes:
    return json.dumps({"text": text}).encode()


def as_parquet(text: str) -> bytes:
    pq.write_table(pa.table({"text": [text]}), sink := pa.BufferOutputStream())
    return sink.getvalue().to_pybytes()


def zipped(text: str) -> bytes:
    return gzip.compress(as_lines(text))


KINDS = [(".txt", as_text), (".jsonl", as_lines), (".parquet", as_parquet), (".jsonl.gz", zipped)]


@both_ways
@pytest.mark.parametrize(("suffix", "content"), KINDS, ids=[suffix for suffix, _ in KINDS])
def test_a_name_is_neither_a_pattern_nor_a_url(
    suffix: str, content: Callable[[str], bytes], streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of files and folders, relative and absolute."""
    monkeypatch.chdir(tmp_path)
    for name in ("a1", "ab", "a", "b"):  # files that patterns and URLs would match
        (tmp_path / f"{name}{suffix}").write_bytes(content("wrong"))
    for name in NAMES:
        (tmp_path / f"{name}{suffix}").write_bytes(content("right"))
        (tmp_path / f"{name}-folder").mkdir()
        (tmp_path / f"{name}-folder" / f"{name}{suffix}").write_bytes(content("right"))
        for place in (f"{name}{suffix}", f"{name}-folder"):
            for files in (place, [str(tmp_path / place)]):
                found = load_documents(DataRecipe(files=files, streaming=streaming))
                assert list(found) == [{"text": "right"}], files
    assert len(expand(f"?1{suffix}")) == 1, "a name without a file is still a pattern"


def test_a_dataset_that_is_a_folder_with_such_a_name(tmp_path: Path) -> None:
    """`datasets` itself reads the name as a pattern, and would read the folder d1."""
    for name in ("d[1]", "d1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(as_lines(name))
    with pytest.raises(
        DataError, match=r"whose name `datasets` takes for a pattern, got '.*d\[1\]'; name it in data.f"
    ):
        load_documents(DataRecipe(dataset=str(tmp_path / "d[1]")))


@both_ways
def test_hidden_files_are_no_documents(streaming: bool, tmp_path: Path) -> None:
    """Hidden files are skipped unless a name or a pattern names them, also below a hidden folder."""
    for name in ("a", ".gitignore", ".ipynb_checkpoints/a", "b/.cache/deep/a", ".data/a", ".data/.a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def read(*names: str) -> list[str]:
        data = DataRecipe(files=[str(tmp_path / name) for name in names], streaming=streaming)
        return [document["text"] for document in load_documents(data)]

    assert read("") == read("**") == ["a"]
    assert read(".data", ".gitignore", "b/.cache/deep/a") == [".data/a", ".gitignore", "b/.cache/deep/a"]
    assert read(".*/*") == [".data/a", ".ipynb_checkpoints/a"]
    with pytest.raises(DataError, match=r"none found \(hidden files must be named\)"):
        read("b")


@both_ways
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_columns_are_not_read(suffix: str, streaming: bool, tmp_path: Path) -> None:
    """`closed_at` is null beyond the 10 MB that a reader inspects, then a timestamp; `mixed` has varying types."""
    mixed = [1, "a", {"b": [None]}, [1, "2"], 1e300]
    records: list[dict[str, Any]] = [
        {"text": f"text {n}", "closed_at": "2020-01-01T00:00:00Z" if n > 1200 else None, "body": "x" * 10_000}
        for n in range(1300)
    ]
    if suffix == ".jsonl":
        lines = [json.dumps(record | {"mixed": mixed[n % 5]}) for n, record in enumerate(records)]
        (tmp_path / "a.jsonl").write_text("\n".join([*lines[:-1], r'{"text": "text 1299", "other": "\ud800"}']))
    else:
        damaged = bytearray(as_parquet_of(records))
        at = damaged.index(b"x" * 10_000)
        damaged[at - 60 : at - 10] = b"\xff" * 50  # the header of the column `body`
        (tmp_path / "a.parquet").write_bytes(damaged)
    found = load_documents(DataRecipe(files=str(tmp_path), streaming=streaming))
    assert list(found) == [{"text": f"text {n}"} for n in range(1300)]


def as_parquet_of(records: list[dict[str, Any]]) -> bytes:
    pq.write_table(pa.Table.from_pylist(records), sink := pa.BufferOutputStream(), compression="none")
    return sink.getvalue().to_pybytes()


@both_ways
def test_text_is_what_is_written(streaming: bool, tmp_path: Path) -> None:
    """Quoted dates, times and numbers are text. In chats, keys stay with their own message."""
    texts = ["2020-01-01", "2020-01-01T10:00:00Z", "17:00", "1e5", "null", "", "a\u2028b\r\n"]
    (tmp_path / "a.jsonl").write_bytes(b"".join(as_lines(text) + b"\n" for text in texts))
    found = load_documents(DataRecipe(files=str(tmp_path / "a.jsonl"), streaming=streaming))
    assert [document["text"] for document in found] == texts
    chat = [
        {"role": "user", "content": "5"},
        {"role": "assistant", "tool_calls": [{"arguments": {"day": "2020-01-01"}}]},
    ]
    other = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"arguments": {"day": [1, "b"]}}]}]
    records: list[dict[str, Any]] = [{"messages": chat}, {"messages": other, "tools": [{"name": "f"}]}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = load_documents(DataRecipe(files=str(tmp_path / "b.jsonl"), format="chat", streaming=streaming))
    assert list(found) == [{"tools": None, **record} for record in records]


def test_a_parquet_column_of_another_type(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pq.write_table(pa.table({"text": [datetime(2020, 1, 1)]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 0: a document must be text, got datetime"):
        training_rows(DataRecipe(files=str(tmp_path)), tokenizer, 8)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet needs the columns text, got \['body'\]"):
        training_rows(DataRecipe(files=str(tmp_path)), tokenizer, 8)


@both_ways
def test_byte_order_marks_and_line_ends(streaming: bool, tmp_path: Path) -> None:
    """A byte order mark at the start of a file belongs to no document; inside a text it is kept."""
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"a\r\nb\xef\xbb\xbf")
    (tmp_path / "b.jsonl").write_bytes(mark + as_lines("a") + b"\r\n" + mark + as_lines("\ufeffb") + b"\r\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(mark + as_lines("c")))
    (tmp_path / "d.json").write_bytes(mark + b'\r\n[\r\n{"text": "d"}]\r\n')
    (tmp_path / "e.json").write_bytes(b'{\n "text":\n  "e"\n}\n')
    (tmp_path / "f.txt").write_bytes("f\u20ac".encode("utf-16"))

    def read(*names: str, **arguments: Any) -> list[str]:
        files = [str(tmp_path / name) for name in names]
        data = DataRecipe(files=files, streaming=streaming, arguments=arguments)
        return [document["text"] for document in load_documents(data)]

    assert read("a.txt") == ["a\nb\ufeff"]
    assert read("a.txt", sample_by="line") == ["a", "b\ufeff"]
    assert read("b.jsonl", "c.jsonl.gz", "d.json", "e.json") == ["a", "\ufeffb", "c", "d", "e"]
    assert read("f.txt", encoding="utf-16") == ["f\u20ac"]
    (tmp_path / "f.txt").write_bytes(b"\na\n\n\nb\nc\n\n")
    assert read("f.txt", sample_by="paragraph") == ["\na", "\nb\nc"]


@both_ways
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_lone_surrogates(chat: bool, streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lone surrogates are refused with their place, or replaced; a pair is one character."""
    key = "completion" if chat else "text"
    lines = [rf'{{"prompt": "a", "{key}": "{text}"}}' for text in ("ab", r"\ud83d\ude00", r"c\ud800d", "e")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options: dict[str, Any] = {"format": "chat" if chat else "text", "packing": "none", "streaming": streaming}
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: .* lone surrogate '\\ud800' .*encoding_errors: replace"):
        list(training_rows(DataRecipe(files=str(tmp_path), **options), tokenizer, 8))
    options["arguments"] = {"encoding_errors": "replace"}
    documents = load_documents(DataRecipe(files=str(tmp_path), **options))
    assert [document[key] for document in documents] == ["ab", "\U0001f600", "c?d", "e"]
    assert len(list(training_rows(DataRecipe(files=str(tmp_path), **options), tokenizer, 8))) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_bad_files": "skip"}, "must be encoding, .*got 'on_bad_files'; .*write dataset: json .*data_files"),
        ({"encoding": "utf-9"}, "data.arguments.encoding must be a text encoding of Python, .* utf-8, got 'utf-9'"),
        ({"encoding": "base64"}, "data.arguments.encoding must be a text encoding of Python, .* got 'base64'"),
        ({"encoding_errors": 3}, "data.arguments.encoding_errors must be strict, replace, ignore or .*, got 3"),
        ({"sample_by": ["line"]}, r"data.arguments.sample_by must be one of document, paragraph, line, got \['line'\]"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=message):
        load_documents(DataRecipe(files=str(tmp_path), arguments=arguments))


def test_compression(tmp_path: Path) -> None:
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(as_lines(suffix)))
        (tmp_path / f"a.parquet{suffix}").write_bytes(pack(as_parquet(suffix)))
        for kind in ("jsonl", "parquet"):
            documents = load_documents(DataRecipe(files=str(tmp_path / f"a.{kind}{suffix}")))
            assert list(documents) == list(documents) == [{"text": suffix}]
        (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(as_lines(suffix) * 99)[:-9])
        with pytest.raises(DataError, match=rf"a\.jsonl{suffix} cannot be read: .*; write the file again or take it"):
            list(load_documents(DataRecipe(files=str(tmp_path / f"a.jsonl{suffix}"))))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("A.JSONL", as_lines("a")),
        ("a.ndjson", as_lines("a")),
        ("A.JSONL.GZ", zipped("a")),
        ("A.Parquet", as_parquet("a")),
    ],
)
def test_a_kind_has_several_endings_in_either_case(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(load_documents(DataRecipe(files=str(tmp_path)))) == [{"text": "a"}]


@pytest.mark.parametrize("files", ["", [], ["corpus", ""]])
def test_no_name_is_not_the_current_folder(
    files: str | list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data\.files must name files, folders or patterns .*; name them"):
        load_documents(DataRecipe(files=files))


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.txt", "a\nb\ncaf\xe9".encode("latin-1"), r"a\.txt, line 3 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "n": ' + b"9" * 5000 + b"}\n", r"a\.jsonl, line 2 .*4300 digits"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "n": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", r"line 2 .*recursion"),
    ],
    ids=["last character", "digits", "nesting"],
)
def test_the_line_that_cannot_be_read_is_named(name: str, content: bytes, place: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=place):
        list(load_documents(DataRecipe(files=str(tmp_path))))
