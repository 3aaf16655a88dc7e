"""Checkpoint folders: the Hub shim beside the weights, and a save that cannot spoil the previous one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHIM_NAME = "linear_llama3_hub.py"
SHIM = '''"""Loads this checkpoint with the installed package: pip install linear-llama3"""

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM, LinearLlama3Model
'''
AUTO_MAP = {
    "AutoConfig": "linear_llama3_hub.LinearLlama3Config",
    "AutoModel": "linear_llama3_hub.LinearLlama3Model",
    "AutoModelForCausalLM": "linear_llama3_hub.LinearLlama3ForCausalLM",
}
STAGING_NAME = ".saving"


@contextmanager
def staged_save(folder: Path, variant: str | None) -> Iterator[Path]:
    """A folder to write a checkpoint into; its files move to `folder` once the block has ended without error.

    The staging folder lies inside `folder`, so that every move is one rename on one file system. Weights go
    first and their index last, then the weights of an earlier save that the new one does not replace are
    removed: transformers would prefer an old `model.safetensors` to new shards.
    """
    staging = folder / STAGING_NAME
    shutil.rmtree(staging, ignore_errors=True)  # of a save that was killed
    staging.mkdir(parents=True)
    try:
        yield staging
        written = sorted(staging.iterdir(), key=lambda path: (".index" in path.name, path.suffix == ".json"))
        for path in written:
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
