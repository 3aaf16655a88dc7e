"""Complete checkpoints: a manifest around Trainer's own save, and the removal of old checkpoints only after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..failures import annotate_write_errors
from . import manifest

ARGUMENTS_NAME = "training_args.bin"


@contextlib.contextmanager
def complete_checkpoint(trainer: Trainer, run_dir: Path, facts: dict[str, Any]) -> Iterator[None]:
    """Mark the checkpoint of the current step as incomplete, let the caller save it, then mark it as complete.

    The caller's save neither removes old checkpoints nor uploads, since both need a complete one. Old checkpoints are
    removed at the end; the upload is up to the caller.

    Args:
        facts: what a resume reads back by `manifest.read_facts`.
    """
    args, folder = trainer.args, manifest.folder_of(run_dir, trainer.state.global_step)
    with annotate_write_errors(trainer, folder):
        if args.should_save:
            manifest.begin(folder)
        trainer.accelerator.wait_for_everyone()
        limit, pushes = args.save_total_limit, args.push_to_hub
        args.save_total_limit, args.push_to_hub = None, False
        try:
            yield
        finally:
            args.save_total_limit, args.push_to_hub = limit, pushes
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            torch.save(args, folder / ARGUMENTS_NAME)  # with the values that were set aside
            manifest.finish(folder, facts)
            manifest.rotate(run_dir, limit, saved=folder, best=trainer.state.best_model_checkpoint)
        trainer.accelerator.wait_for_everyone()
