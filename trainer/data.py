"""From documents to rows of tokens, through the `datasets` library."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from ..sequence_parallel.context import IGNORE_INDEX
from .recipe import DataRecipe


def load_documents(data: DataRecipe) -> Dataset:
    """A dataset whose column "text" holds one document per row."""
    if data.dataset is not None:
        documents = load_dataset(data.dataset, split=data.split, **data.arguments)
        if not isinstance(documents, Dataset):
            raise ValueError(
                f"data must load as one dataset with an index, got {type(documents).__name__} for "
                f"{data.dataset!r}; leave streaming out"
            )
        if data.text_column not in documents.column_names:
            raise ValueError(
                f"text_column must be a column of {data.dataset}, one of {documents.column_names}, "
                f"got {data.text_column!r}"
            )
        return documents.select_columns([data.text_column]).rename_column(data.text_column, "text")
    assert data.files is not None
    names = [data.files] if isinstance(data.files, str) else data.files
    files = [str(path) for name in names for path in _expand(name)]
    return load_dataset("text", data_files=files, sample_by="document", split="train", encoding_errors="replace")


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


def pack_documents(documents: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Rows of `length` tokens: `input_ids`, `labels`, and `position_ids` that restart at every document.

    Documents follow each other in their order, each closed by the end-of-sequence token. What does not fit a row
    continues in the next one as a document of its own, and the last tokens, too few for a row, are left out. The
    first token of a document is nobody's target.
    """

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        closing = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [document + closing for document in ids]}

    tokens = documents.map(tokenize, batched=True, batch_size=100, remove_columns=["text"], desc="Tokenizing")
    total = 0
    for document in tokens:
        total += len(document["input_ids"])
        if total >= length:
            return Dataset.from_generator(_rows, gen_kwargs={"documents": tokens, "length": length})
    raise ValueError(
        f"the data must fill at least one row of sequence_length = {length} tokens, got {total} tokens; "
        "add documents or shorten sequence_length"
    )


def _rows(documents: Dataset, length: int) -> Iterator[dict[str, Any]]:
    ids: list[int] = []
    positions: list[int] = []
    for document in documents:
        tokens, start = document["input_ids"], 0
        while start < len(tokens):
            piece = tokens[start : start + length - len(ids)]
            start += len(piece)
            ids += piece
            positions += range(len(piece))
            if len(ids) == length:
                labels = [IGNORE_INDEX if p == 0 else i for i, p in zip(ids, positions, strict=True)]
                yield {"input_ids": ids, "labels": labels, "position_ids": positions}
                ids, positions = [], []
