"""Exact resumes: the checkpoint to continue from, and the position in the data."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from accelerate.utils import gather_object
from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from . import manifest
from .manifest import LATEST, ResumeError

logger = logging.get_logger(__name__)


def find_checkpoint(args: TrainingArguments, wanted: str | bool | None) -> str | None:
    """Return the complete checkpoint to resume from, the same on all processes, or None to start a new run.

    Args:
        wanted: a folder; True or "latest" for the newest complete checkpoint of output_dir.

    Raises:
        ResumeError: the folder is incomplete, True finds no checkpoint, or a checkpoint has no optimizer state.
    """
    if wanted is None or wanted is False:
        return None
    output_dir, named = Path(args.output_dir), wanted is not True and wanted != LATEST
    if named:
        folders = [Path(str(wanted))]
    else:
        steps = sorted(set(itertools.chain(*gather_object([manifest.steps(output_dir)]))), reverse=True)
        folders = [manifest.folder_of(output_dir, step) for step in steps]
    for folder in folders:
        own = manifest.find_defect(folder) if args.local_process_index == 0 else None
        defect = next((defect for defect in gather_object([own]) if defect is not None), None)  # on any machine
        if defect is None:
            if not any(folder.glob("optimizer*")):  # Trainer would start with a new one
                raise ResumeError(
                    f"a resumed run needs the optimizer's state, got {folder} without it (save_only_model=True); load "
                    "its weights as those of a new run"
                )
            return str(folder)
        if named:
            newest = manifest.newest(folder.parent)
            remedy = f"{newest} is" if newest else f"none in {folder.parent} is"
            raise ResumeError(f"resume_from_checkpoint must be complete, got {folder}: {defect}; {remedy}")
        warn(args, f"{folder} is not complete: {defect}; trying the checkpoint before it")
    if wanted == LATEST:
        return None
    raise ResumeError(
        f"resume_from_checkpoint=True needs a complete checkpoint in output_dir, got {output_dir} with none; "
        f'"{LATEST}" starts a new run in that case'
    )


def stream_position(checkpoint: str, accumulation: int) -> tuple[int, int]:
    """Return (passes, batches of the next pass) that a run has trained on, for a stream without a length.

    Trainer counts a pass of such a stream as an epoch of `max_steps`, and knows the first one only.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint) / manifest.STATE_NAME))
    passes = math.ceil(state.epoch) - 1
    return passes, round((state.epoch - passes) * state.max_steps) * accumulation


def warn(args: TrainingArguments, message: str) -> None:
    """Log a warning on the first process."""
    if args.process_index == 0:
        logger.warning(message)
