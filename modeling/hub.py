"""Checkpoint folders: the Hub shim next to the weights, and saves that leave the previous checkpoint intact on failure.

A save does not replace a model card that a user wrote.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AUTO_CLASSES = {
    "AutoModel": "LinearLlama3Model",
    "AutoModelForCausalLM": "LinearLlama3ForCausalLM",
    "AutoModelForMaskedLM": "LinearLlama3ForMaskedLM",
    "AutoModelForQuestionAnswering": "LinearLlama3ForQuestionAnswering",
    "AutoModelForSequenceClassification": "LinearLlama3ForSequenceClassification",
    "AutoModelForTokenClassification": "LinearLlama3ForTokenClassification",
}
"""Auto class of transformers -> our class: for registration, and for a checkpoint's `auto_map` and shim."""

_CLASSES = {"AutoConfig": "LinearLlama3Config", **AUTO_CLASSES}
_IMPORTS = "".join(f"        {name},\n" for name in sorted(_CLASSES.values()))
SHIM_NAME = "linear_llama3_hub.py"
SHIM = f'''"""Load this checkpoint with the installed package linear_llama3."""

try:
    from linear_llama3 import (
{_IMPORTS}    )
except ModuleNotFoundError as error:
    if error.name != "linear_llama3":
        raise
    raise ImportError(
        "this checkpoint needs the package linear_llama3, which is not installed and is not on a package index; run "
        "`pip install .` in a checkout of its source"
    ) from error
'''
AUTO_MAP = {auto_class: f"{Path(SHIM_NAME).stem}.{name}" for auto_class, name in _CLASSES.items()}

STAGING_NAME = ".saving"

CARD_NAME, NOTICE_NAME = "README.md", "NOTICE"
SAVED_CARD = "Written by save_pretrained, which replaces it while this line is here."
RUN_CARD = "Written after a training run; the next one replaces it while this line is here."
SAVED_CARDS = (SAVED_CARD, "This model card has been automatically generated.")  # the latter is transformers' own


def is_generated_card(card: Path, *marks: str) -> bool:
    """True if there is no card, or if it contains one of the marks of generated cards; all others are the user's."""
    return not card.is_file() or any(mark in card.read_text(encoding="utf-8", errors="replace") for mark in marks)


def final_folder(folder: Path) -> Path:
    """Return the folder to which a checkpoint in `folder` will be moved when it is complete."""
    return folder.parent if folder.name == STAGING_NAME else folder


def write_shim(folder: str | os.PathLike) -> None:
    """Write the module that `auto_map` names into the folder of a config."""
    os.makedirs(folder, exist_ok=True)
    (Path(folder) / SHIM_NAME).write_text(SHIM, encoding="utf-8")


@contextmanager
def staged_save(folder: Path, variant: str | None) -> Iterator[Path]:
    """Yield a folder to write a checkpoint into; move its files to `folder` when the block ends without error.

    The staging folder is inside `folder`, so that every move is one rename on one file system. Weights are moved first
    and their index last. Then weights of an earlier save that the new one does not replace are removed: transformers
    would prefer an old `model.safetensors` to new shards. A user's README.md is kept.
    """
    staging = folder / STAGING_NAME
    shutil.rmtree(staging, ignore_errors=True)  # left by a save that was killed
    staging.mkdir(parents=True)
    try:
        yield staging
        written = sorted(staging.iterdir(), key=lambda path: (".index" in path.name, path.suffix == ".json"))
        for path in written:
            if path.name != CARD_NAME or is_generated_card(folder / CARD_NAME, *SAVED_CARDS):
                os.replace(path, folder / path.name)
        _remove_stale_weights(folder, {path.name for path in written}, variant)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_stale_weights(folder: Path, written: set[str], variant: str | None) -> None:
    infix = f".{variant}" if variant else ""
    weights = re.compile(
        rf"model{re.escape(infix)}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{re.escape(infix)}\.json"
    )
    if any(weights.fullmatch(name) for name in written):
        for path in folder.iterdir():
            if weights.fullmatch(path.name) and path.name not in written:
                path.unlink()
