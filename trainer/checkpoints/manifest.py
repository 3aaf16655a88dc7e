"""Complete and incomplete checkpoint folders.

`manifest.json` is the first file of a checkpoint and marks the save as unfinished. When all ranks have written, one
rename replaces it by the list of all files with their sizes. A folder without a manifest was saved by a plain Trainer:
it is complete if `trainer_state.json`, which is written last, exists and all weights can be opened.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

MANIFEST_NAME = "manifest.json"
STATE_NAME = "trainer_state.json"
LATEST = "latest"  # value of resume_from_checkpoint: starts a new run if there is nothing to resume from
_FOLDER = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_UNFINISHED_MARK = "checkpoint-is-incomplete.txt"  # written by transformers' own enable_jit_checkpoint
_UNFINISHED = "its save did not finish"


class ResumeError(ValueError):
    """A checkpoint from which this launch cannot continue exactly."""


def make_folder(folder: Path) -> None:
    """Create the folder of a run, or raise ValueError, on every rank; transformers does so on rank 0 only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(not_writable(folder, error)) from error


def not_writable(folder: Path, error: OSError) -> str:
    return f"output_dir must be a folder that can be written to, got {folder}: {error.strerror}; choose another"


def begin(folder: Path) -> None:
    """Create an empty checkpoint folder that is marked as incomplete."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write(folder, {"complete": False})


def finish(folder: Path, facts: dict[str, Any]) -> None:
    """Mark a folder as complete, with the files that all ranks have written and that are now on the disk.

    Args:
        facts: values for `read_facts`.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a power loss must not leave a complete manifest of empty files
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    _write(folder, {"complete": True, "files": sizes, "facts": facts})


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    new = folder / f"{MANIFEST_NAME}.new"
    new.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    os.replace(new, folder / MANIFEST_NAME)


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts given to `finish`; none for a checkpoint of a plain Trainer."""
    path = folder / MANIFEST_NAME
    return json.loads(path.read_text(encoding="utf-8"))["facts"] if path.is_file() else {}


def find_defect(folder: Path) -> str | None:
    """Describe in a few words why a checkpoint is not complete; None if it is."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        if not (folder / MANIFEST_NAME).is_file():
            return _plain_defect(folder)
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        if not manifest["complete"]:
            return _UNFINISHED
        for name, size in manifest["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (got := (folder / name).stat().st_size) != size:
                return f"{name} has {got:,} bytes of {size:,}"
        return None
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        return f"it cannot be read: {error}"


def _plain_defect(folder: Path) -> str | None:
    if (folder / _UNFINISHED_MARK).exists():
        return _UNFINISHED
    if not (folder / STATE_NAME).is_file():
        return f"{STATE_NAME}, which is written last, is missing"
    json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    _saved_shapes(folder)  # opening a file compares its header with its size
    return None


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def check_sizes(folder: Path, model: nn.Module) -> None:
    """Check that the weights of a checkpoint fit a model. FSDP's checkpoints are left to torch.

    Without this check, torch would print a line for each wrong weight, and load a deeper model's checkpoint in part.

    Raises:
        ResumeError: names or shapes differ.
    """
    if not (saved := _saved_shapes(folder)):
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
    """Return the steps of a run's checkpoints, complete or not, the newest first."""
    names = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
    return sorted((int(match[1]) for name in names if (match := _FOLDER.fullmatch(name))), reverse=True)


def folder_of(output_dir: Path, step: int) -> Path:
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def newest(output_dir: Path) -> Path | None:
    """Return the complete checkpoint with the largest step."""
    folders = (folder_of(output_dir, step) for step in steps(output_dir))
    return next((folder for folder in folders if find_defect(folder) is None), None)


def clear(output_dir: Path) -> None:
    """Remove the checkpoints and the state of another run, which a later resume would mistake for its own."""
    for step in steps(output_dir):
        shutil.rmtree(folder_of(output_dir, step))
    (output_dir / STATE_NAME).unlink(missing_ok=True)


def rotate(output_dir: Path, limit: int | None, *, saved: Path, best: str | None) -> None:
    """Apply Trainer's `save_total_limit` to complete checkpoints, and remove incomplete ones.

    transformers' own `rotate_checkpoints` counts incomplete checkpoints, and deletes the one just saved if the file
    system keeps no times and an older run has left a larger step. Here `saved` and `best` always stay.
    """
    if limit is None or limit <= 0 or find_defect(saved) is not None:
        return
    by_age = [Path(folder) for folder in sort_checkpoints(str(output_dir), use_mtime=True)]
    folders = [folder for folder in by_age if _FOLDER.fullmatch(folder.name)]
    complete = [folder for folder in folders if find_defect(folder) is None]
    kept = {saved, *(folder for folder in complete if best is not None and folder == Path(best))}
    older = [folder for folder in complete if folder not in kept]
    kept.update(older[len(older) - max(limit - len(kept), 0) :])
    for folder in set(folders) - kept:
        shutil.rmtree(folder, ignore_errors=True)
