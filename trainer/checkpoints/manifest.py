"""Checkpoint folders that are whole, or known not to be.

`manifest.json` is the first file of a checkpoint and says that a save is under way. Once all ranks have written, it is
replaced, in one rename, by the list of the files with their sizes and checksums. A folder without one is of a plain
Trainer: whole if `trainer_state.json`, which is written last, is there and all weights can be opened.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

MANIFEST_NAME = "manifest.json"
STATE_NAME = "trainer_state.json"
LATEST = "latest"  # value of resume_from_checkpoint: starts a new run if there is nothing to resume from
_FOLDER = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_UNFINISHED = "checkpoint-is-incomplete.txt"  # transformers' own mark, of its enable_jit_checkpoint
_THREADS = 8  # that read files; a checksum takes about a second for 1.5 GB in each


class ResumeError(ValueError):
    """A checkpoint that this launch cannot go on from exactly."""


def make_folder(folder: Path) -> None:
    """Create the folder of a run, or raise ValueError, on every rank; transformers does so on rank 0 only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(not_writable(folder, error)) from error


def not_writable(folder: Path, error: OSError) -> str:
    return f"output_dir must be a folder that can be written to, got {folder}: {error.strerror}; choose another"


def begin(folder: Path) -> None:
    """An empty checkpoint folder that is known not to be whole."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write(folder, {"whole": False})


def finish(folder: Path, facts: dict[str, Any]) -> None:
    """Declares a folder, with what all ranks have written, whole.

    Args:
        facts: what `read_facts` gives back.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(_flush, files))  # the rename must not reach the disk before them
        sums = list(pool.map(_checksum, files))
    entries = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, checksum]
        for path, checksum in zip(files, sums, strict=True)
    }
    _write(folder, {"whole": True, "files": entries, "facts": facts})


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    new = folder / f"{MANIFEST_NAME}.new"
    new.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    _flush(new)
    os.replace(new, folder / MANIFEST_NAME)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _checksum(path: Path) -> int:
    """CRC-32: finds accidents, not attacks."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def read_facts(folder: Path) -> dict[str, Any]:
    """What was given to `finish`; empty for a checkpoint of a plain Trainer."""
    path = folder / MANIFEST_NAME
    return json.loads(path.read_text(encoding="utf-8"))["facts"] if path.is_file() else {}


def problem(folder: Path, *, contents: bool = False) -> str | None:
    """Why a checkpoint is not whole, in a few words; None if it is.

    Args:
        contents: reads every file and compares the checksums; else only sizes are compared.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        if not (folder / MANIFEST_NAME).is_file():
            return _plain_problem(folder)
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        if not manifest["whole"]:
            return "its save did not come to an end"
        for name, (size, _) in manifest["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (got := (folder / name).stat().st_size) != size:
                return f"{name} has {got:,} bytes of {size:,}"
        return _corruption(folder, manifest["files"]) if contents else None
    except (ValueError, KeyError, OSError) as error:
        return f"it cannot be read: {error}"


def _corruption(folder: Path, files: dict[str, list[int]]) -> str | None:
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(_checksum, [folder / name for name in files])
        broken = [name for (name, (_, saved)), now in zip(files.items(), sums, strict=True) if now != saved]
    return f"{', '.join(broken)} no longer holds what was saved (checksum)" if broken else None


def _plain_problem(folder: Path) -> str | None:
    if (folder / _UNFINISHED).exists():
        return "its save did not come to an end"
    if not (folder / STATE_NAME).is_file():
        return f"{STATE_NAME}, which is written last, is missing"
    json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:  # compares the header with the file's size
                file.keys()
        except SafetensorError as error:
            return f"{path.name} cannot be read: {error}"
    return None


def check_sizes(folder: Path, model: nn.Module) -> None:
    """Check that the weights of a checkpoint fit a model. FSDP's checkpoints are left to torch.

    Without this check, torch would print a line for each wrong weight, and load a deeper model's checkpoint in part.

    Raises:
        ResumeError: names or shapes differ.
    """
    saved: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if not saved:
        return
    own = {name.replace(".default.", "."): tuple(x.shape) for name, x in model.state_dict().items()}  # PEFT's adapter
    other = [
        f"{name} {saved[name]} where the run has {own.get(name, 'none')}"
        for name in sorted(saved)
        if own.get(name) != saved[name]
    ]
    if not hasattr(model, "peft_config"):
        tied = getattr(model, "all_tied_weights_keys", {})
        other += [f"no {name}" for name in sorted(own.keys() - saved.keys() - tied.keys())]
    if other:
        further = f" and {len(other) - 3} others" if len(other) > 3 else ""
        raise ResumeError(
            f"a checkpoint must be of the same model, got {folder} with {'; '.join(other[:3])}{further}; resume with "
            "the model that was saved, or train this one in another output_dir"
        )


def steps(output_dir: Path) -> list[int]:
    """The steps of a run's checkpoints, whole or not, the newest first."""
    names = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
    return sorted((int(match[1]) for name in names if (match := _FOLDER.fullmatch(name))), reverse=True)


def folder_of(output_dir: Path, step: int) -> Path:
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def newest(output_dir: Path) -> Path | None:
    """The whole checkpoint (by the sizes of its files) with the largest step."""
    folders = (folder_of(output_dir, step) for step in steps(output_dir))
    return next((folder for folder in folders if problem(folder) is None), None)


def clear(output_dir: Path) -> None:
    """Remove the checkpoints and the state of another run, which a later resume would mistake for its own."""
    for step in steps(output_dir):
        shutil.rmtree(folder_of(output_dir, step))
    (output_dir / STATE_NAME).unlink(missing_ok=True)


def rotate(output_dir: Path, limit: int | None, *, saved: Path, best: str | None) -> None:
    """Trainer's `save_total_limit`, counting whole checkpoints only: the one just saved and the best one stay in any
    case, whatever a file system says of times, and further new ones up to the limit; older ones and broken ones go."""
    if limit is None or limit <= 0:
        return
    by_age = [Path(folder) for folder in sort_checkpoints(str(output_dir), use_mtime=True)]
    folders = [folder for folder in by_age if _FOLDER.fullmatch(folder.name)]
    whole = [folder for folder in folders if problem(folder) is None]
    if saved not in whole:
        return
    kept = {saved, *(folder for folder in whole if best is not None and folder == Path(best))}
    for folder in reversed(whole):
        if len(kept) < limit:
            kept.add(folder)
    for folder in set(folders) - kept:
        shutil.rmtree(folder, ignore_errors=True)
