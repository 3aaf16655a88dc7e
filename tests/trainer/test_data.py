"""Data of all kinds: the same rows, stored or streamed, from whatever file; and what is said of broken ones."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from linear_llama3.trainer.data import training_rows as rows_of
from linear_llama3.trainer.data.documents import DataError, load_documents
from linear_llama3.trainer.data.training_rows import training_rows
from linear_llama3.trainer.recipes.recipe import DataRecipe
from tests.helpers.recipes import write_tokenizer

TEXTS = ["abcdef", "g", "", "hijklmnopqrst", "uv", "wxyz"]
CHATS = [{"prompt": text[:1], "completion": text[1:]} for text in TEXTS if len(text) > 1]
GOOD = b'{"text": "abcdefgh"}\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def lines(values: list[Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def write_texts(folder: Path) -> None:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)


def write_lines(folder: Path) -> None:
    records = [{"text": text, "year": 1} for text in TEXTS]
    (folder / "a.jsonl").write_bytes(lines(records[:4]))
    (folder / "b.jsonl").write_bytes(b"\n" + lines(records[4:]))


def write_zipped(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines([{"text": text} for text in TEXTS])))


def write_array(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))


def write_parquet(folder: Path) -> None:
    pq.write_table(pa.table({"year": [1] * 6, "text": TEXTS}), folder / "a.parquet", row_group_size=2)


WRITERS = [write_texts, write_lines, write_zipped, write_array, write_parquet]


def content(rows: Any) -> list[dict[str, list[int]]]:
    assert all(isinstance(column, list) for row in rows for column in row.values()), "collators make int64 of lists"
    return [dict(row) for row in rows]


ROWS = {  # of 8 tokens; "_" ends a document, and fills rows up
    ("wrapped", "continue"): "abcdef_g _hijklmn opqrst_u",
    ("wrapped", "cut"): "abcdef_g _hijklmn ouv_wxyz",
    ("best_fit", "continue"): "abcdef__ g_pqrst_ hijklmno uv_wxyz_",
    ("best_fit", "cut"): "abcdef__ g_______ hijklmno uv_wxyz_",
    ("none", "continue"): "abcdef_ g_ hijklmno pqrst_ uv_ wxyz_",
    ("none", "cut"): "abcdef_ g_ hijklmno uv_ wxyz_",
}


@pytest.mark.parametrize("write", WRITERS)
def test_all_kinds_give_the_same_rows(
    write: Callable[[Path], None], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Stored or streamed, as files or as a dataset (where `datasets` takes every line of a text for a document)."""
    (folder := tmp_path / "corpus").mkdir()
    write(folder)
    for (packing, long_documents), expected in ROWS.items():
        options: dict[str, Any] = {"packing": packing, "long_documents": long_documents}
        stored = content(training_rows(DataRecipe(files=str(folder), **options), tokenizer, 8))
        spelled = ["".join(tokenizer.convert_ids_to_tokens(row["input_ids"])) for row in stored]
        assert spelled == expected.split(), (packing, long_documents)
        streamed = training_rows(DataRecipe(files=str(folder), streaming=True, **options), tokenizer, 8)
        assert content(streamed) == content(streamed) == stored
        if write not in (write_texts, write_array):
            named = DataRecipe(dataset=str(folder), streaming=True, **options)
            assert content(training_rows(named, tokenizer, 8)) == stored


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
def test_completions_are_learnt(streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_bytes(lines(CHATS))
    data = DataRecipe(files=str(file), format="chat", packing="best_fit", streaming=streaming)
    rows = content(training_rows(data, tokenizer, 8))
    learnt = ["".join(" " if i == -100 else tokenizer.convert_ids_to_tokens(i) for i in row["labels"]) for row in rows]
    assert learnt == [" bcdef_ ", " ijklmno", " qrst_  ", " v_ xyz_"]


def test_the_cache_is_used_until_something_changes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the files that `datasets` writes. Another process has another tokenizer object, used or not."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines([{"text": text} for text in TEXTS]))
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def files(length: int = 8, **options: Any) -> set[str]:
        words = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        rows = training_rows(DataRecipe(files=str(file), **options), words, length)
        return {str(entry["filename"]) for entry in rows.cache_files}

    first = files()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    assert len(times) == 2, "tokens, rows"
    assert files() == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")} == times
    others = [files(7), files(packing="best_fit"), files(long_documents="cut")]
    monkeypatch.setattr(rows_of, "CACHE_VERSION", 2)
    others.append(files())
    file.write_bytes(lines([{"text": text} for text in TEXTS[::-1]]))
    os.utime(file, (1, 1))
    others.append(files())
    assert len({frozenset(found) for found in (first, *others)}) == 6


def test_columns(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(lines([{"body": "abc", "year": 1, "prompt": "a", "completion": "b"}]))
    for streaming in (False, True):
        documents = load_documents(DataRecipe(files=str(file), text_column="body", streaming=streaming))
        assert list(documents) == [{"text": "abc"}]
        with pytest.raises(DataError, match=r"text_column must be one of .*'body', 'year'.*, got 'text'; format: chat"):
            load_documents(DataRecipe(files=str(file), streaming=streaming))
    assert list(load_documents(DataRecipe(files=str(file), format="chat"))) == [
        {"prompt": "a", "completion": "b", "tools": None}
    ]
    file.write_bytes(GOOD)
    with pytest.raises(DataError, match=r"needs a column messages, or prompt and completion, got \['text'\]"):
        load_documents(DataRecipe(files=str(file), format="chat"))
    with pytest.raises(DataError, match=r"data\.arguments must leave out split; set it in data itself"):
        load_documents(DataRecipe(dataset="json", arguments={"split": "train"}))


def parquet(rows: int = 1000, text: Any = "abcdefgh") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"text": [text] * rows}), sink, row_group_size=100, compression="none", use_dictionary=False
    )
    return sink.getvalue().to_pybytes()


def damaged_parquet() -> bytes:
    """Bytes in the middle of the rows are others, the schema at the end is intact."""
    complete = bytearray(parquet())
    complete[4:40] = b"\xff" * 36
    return bytes(complete)


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", GOOD * 2 + b'{"text": "ab\n' + GOOD, r"line 3 is not JSON: .* \(column 10\); correct or remove it"),
        ("a.jsonl", GOOD * 3 + b'{"text": "abc"', r"line 4 is not JSON: Expecting ',' delimiter"),
        ("a.jsonl", GOOD + b"\n[1]\n", r"line 3 must be a JSON object, got list; correct or remove it"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "line 2 is not UTF-8: .*; correct it, take the file out"),
        (
            "a.jsonl",
            GOOD + b'\n{"text": null}\n',
            "line 3: a document must be text, got None; correct it or take it out",
        ),
        ("a.jsonl", GOOD + b'{"txt": "abc"}\n', "line 2: a document must be text, got None"),
        ("a.jsonl", GOOD + b'{"text": 5}\n', "line 2: a document must be text, got 5; correct it or take it out"),
        ("a.jsonl", b"", r"a\.jsonl is empty; take it out of the data"),
        ("a.jsonl", b"\n\n", r"a\.jsonl is empty; take it out of the data"),
        (
            "a.jsonl.gz",
            gzip.compress(GOOD * 99)[:-12],
            r"a\.jsonl\.gz cannot be read: .*; write the file again or take it out",
        ),
        (
            "a.jsonl.gz",
            GOOD,
            r"a\.jsonl\.gz cannot be read: Not a gzipped file .*; write the file again or take it out",
        ),
        (
            "a.parquet",
            b"",
            r"a\.parquet cannot be read: .* 0 bytes; write the file again or take it out",
        ),
        (
            "a.parquet",
            parquet()[:-500],
            r"a\.parquet cannot be read: .*; write the file again or take it out",
        ),
        ("a.parquet", damaged_parquet(), r"a\.parquet cannot be read: .*; write the file again or take it out"),
        ("a.parquet", parquet(0), r"a\.parquet is empty; take it out"),
        ("a.parquet", parquet(3, None), r"a\.parquet, row 0: a document must be text, got None"),
        ("a.txt", b"ab\nc\xff", r"a\.txt, line 2 is not UTF-8: .*data\.arguments\.encoding_errors: replace"),
        (
            "a.txt",
            b"",
            "must fill at least one row of sequence_length = 8 tokens, got 0 tokens; add documents",
        ),
        ("a.txt", b"abc", "must fill at least one row of sequence_length = 8 tokens, got 4 tokens; add documents"),
    ],
)
def test_broken_files(
    name: str, data: bytes, message: str, streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(training_rows(DataRecipe(files=str(tmp_path / name), streaming=streaming), tokenizer, 8))


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
def test_the_broken_one_of_many_files(streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Its name, also where the stream has given rows before."""
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(GOOD * 200)
    (tmp_path / "1.jsonl").write_bytes(GOOD * 199 + b"{")
    data = DataRecipe(files=str(tmp_path / "*.jsonl"), streaming=streaming)
    with pytest.raises(DataError, match=r"1\.jsonl, line 200 is not JSON"):
        list(training_rows(data, tokenizer, 8))
    (tmp_path / "1.jsonl").write_bytes(GOOD * 199 + b'{"text": null}\n')
    with pytest.raises(DataError, match=r"1\.jsonl, line 200: a document must be text, got None"):
        list(training_rows(data, tokenizer, 8))


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dataset": "no/such"},
            "dataset 'no/such' cannot be read: .*check its name, data.arguments and",
        ),
        (
            {"dataset": "json", "arguments": {"data_files": "http://127.0.0.1:1/a.jsonl"}},
            "dataset 'json' cannot be read",
        ),
        ({"files": "no/such/*.txt"}, r"data\.files must name files, folders or patterns with files, got .*none found"),
        ({"files": [__file__, str(Path(__file__).parent / "*.jsonl")]}, "none found"),
    ],
)
def test_data_that_is_not_there(options: dict[str, Any], message: str, streaming: bool) -> None:
    with pytest.raises(DataError, match=message):
        list(load_documents(DataRecipe(**options, streaming=streaming)))


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
def test_a_document_of_a_dataset_is_named_by_its_number(
    streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (folder := tmp_path / "corpus").mkdir()
    (folder / "a.jsonl").write_bytes(GOOD + b'{"text": null}\n')
    with pytest.raises(DataError, match=f"document 1 of {folder}: a document must be text, got None"):
        list(training_rows(DataRecipe(dataset=str(folder), streaming=streaming), tokenizer, 8))


def test_lists_of_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "a.json"
    data = DataRecipe(files=str(file))
    file.write_bytes(b'[{"text": "a"}, {"text": 5}]')
    with pytest.raises(DataError, match=r"a\.json, object 1 of the list: a document must be text, got 5"):
        training_rows(data, tokenizer, 8)
    file.write_bytes(b'[{"text": "a"},\n {"text": }]')
    with pytest.raises(DataError, match="line 2 is not JSON: Expecting value"):
        training_rows(data, tokenizer, 8)
    file.write_bytes(b'[{"text": "abcdefg"}, 5]')
    with pytest.raises(DataError, match=r"a\.json, object 1 of the list must be a JSON object, got int; correct or"):
        training_rows(data, tokenizer, 8)


def test_files_of_several_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.txt").write_text("a")
    with pytest.raises(
        DataError, match=r"of one kind, got json \(.*a\.jsonl\), text \(.*b\.txt\); name them by a pattern"
    ):
        load_documents(DataRecipe(files=str(tmp_path)))
