"""Checks of a recipe before anything starts, without a model or a device.

`linear-llama3 train` runs them once, before it starts processes. The processes repeat those that depend on the machine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.chat_template_utils import render_jinja_template

from ...sequence_parallel.planner.profile import load_profile
from ..adaptive.checks import check_profile
from ..checkpoints import manifest
from ..data.documents import load_documents
from ..data.files import DataError
from ..parallelism import resolve_parallelism
from .build import build_config, load_tokenizer
from .recipe import DataRecipe, Recipe

MODELS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


class NothingLeft(Exception):
    """Raised if a run that has already finished is launched again."""


def check_before_launch(recipe: Recipe, processes: int) -> None:
    """Check a recipe for mistakes that would end every process of a launch.

    Raises:
        ValueError: the recipe has such a mistake.
        NothingLeft: the run has already finished.
    """
    if recipe.sequence_parallel.profile is not None:
        name = recipe.sequence_parallel.profile
        check_profile(load_profile(name), name, processes)
    else:
        resolve_parallelism(None, recipe.sequence_parallel.size, processes)
    check_output_dir(recipe.training)
    _check_resume(recipe.training)
    check_trackers(recipe.training)
    tokenizer = load_tokenizer(recipe)
    if recipe.data.chat_template is not None:
        _check_template(recipe.data.chat_template, tokenizer)
    build_config(recipe, tokenizer)
    _check_files(recipe.data)
    if recipe.validation is not None:
        try:
            _check_files(recipe.validation.data(recipe.data))
        except DataError as error:
            raise DataError(f"validation: {error}") from error


def _check_files(data: DataRecipe) -> None:
    """`DataError` unless the files are there, and the first record has the columns."""
    if data.files is not None:
        load_documents(data)


def _check_resume(training: Mapping[str, Any]) -> None:
    resume, folder = training.get("resume_from_checkpoint"), Path(training.get("output_dir", "trainer_output"))
    if resume is True and not manifest.steps(folder):
        raise ValueError(
            f"resume_from_checkpoint: true needs a complete checkpoint in output_dir, got {folder} with none; "
            f"{manifest.LATEST} starts a new run in that case"
        )
    if isinstance(resume, str) and resume != manifest.LATEST and not Path(resume).is_dir():
        raise ValueError(
            f"resume_from_checkpoint must be the folder of a checkpoint, true or {manifest.LATEST}, got {resume!r}: "
            "no such folder"
        )


def _check_template(file: str, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        render_jinja_template([[{"role": "user", "content": ""}]], chat_template=tokenizer.get_chat_template())
    except TemplateError as error:
        if not isinstance(error, TemplateSyntaxError):
            return  # a valid template may refuse this conversation
        raise ValueError(
            f"data.chat_template must be a Jinja template, got {file!r}, line {error.lineno}: {error.message}; fix it"
        ) from error


def check_trackers(training: Mapping[str, Any]) -> None:
    """Raise ValueError if a tracker of `report_to` is unknown or not installed."""
    names = training.get("report_to")
    if names in (None, "none", ["none"]):
        return
    try:
        callbacks = get_reporting_integration_callbacks("all" if names == ["all"] else names)
    except ValueError as error:
        raise ValueError(f"training.report_to must name trackers, got {names}: {error}") from error
    for make in callbacks:
        try:
            make()
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"training.report_to must name installed trackers, got {names}: {error} Or set report_to: none"
            ) from error


def check_output_dir(training: Mapping[str, Any]) -> None:
    """Check that a run may write to its `output_dir`, and create the folder.

    Args:
        training: the section `training` of a recipe.

    Raises:
        ValueError: the folder cannot be written to, or holds another run that this one would replace.
        NothingLeft: the folder holds this run, already finished.
    """
    folder = Path(training.get("output_dir", "trainer_output"))
    resume = training.get("resume_from_checkpoint") or None
    manifest.make_folder(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(manifest.not_writable(folder, error)) from error
    if training.get("overwrite_output_dir", False):
        if resume is not None:
            raise ValueError(
                "overwrite_output_dir: true starts a new run and resume_from_checkpoint continues one, got both (with "
                f"{resume!r}); leave one of them out"
            )
        return
    model = next((name for name in MODELS if (folder / name).exists()), None)
    if resume in (True, manifest.LATEST):
        if model is not None and (reached := _reached(folder, training)) is not None:
            raise NothingLeft(f"nothing is left to train: {folder} holds this run's model, {reached}")
        if model is None or manifest.newest(folder) is not None:
            return
        raise ValueError(_taken(folder, f"a model ({model}) and no complete checkpoint to resume from", ""))
    steps = manifest.steps(folder)
    if (model is None and not steps) or (resume is not None and Path(resume).resolve().parent == folder.resolve()):
        return
    held = [] if model is None else [f"a model ({model})"]
    if steps:
        held.append(f"checkpoints up to step {steps[0]}")
    raise ValueError(
        _taken(folder, " and ".join(held), ", set resume_from_checkpoint: latest to continue that run" if steps else "")
    )


def _taken(folder: Path, held: str, resume: str) -> str:
    return (
        f"output_dir must not hold another run, which would be replaced, got {folder} with {held}; choose another "
        f"folder{resume}, or set overwrite_output_dir: true to replace it"
    )


def _reached(folder: Path, training: Mapping[str, Any]) -> str | None:
    """Return how far a finished run has trained; None if steps or epochs are left."""
    file = folder / manifest.STATE_NAME  # written after the model
    if not file.is_file():
        return None
    state = json.loads(file.read_text(encoding="utf-8"))
    step, epoch = state.get("global_step", 0), state.get("epoch") or 0
    if (last := training.get("max_steps", -1)) > 0:
        return f"step {step} of {last}" if step >= last else None
    epochs = training.get("num_train_epochs", 3)
    return f"epoch {epoch:g} of {epochs:g}" if epoch >= epochs else None
