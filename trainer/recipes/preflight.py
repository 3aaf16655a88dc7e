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
from .recipe import Recipe

MODELS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def check_before_launch(recipe: Recipe, processes: int) -> str | None:
    """Check a recipe for mistakes that would end every process of a launch.

    Returns:
        a message if the run has already finished, else None.

    Raises:
        ValueError: the recipe has such a mistake.
    """
    if recipe.sequence_parallel.profile is not None:
        name = recipe.sequence_parallel.profile
        check_profile(load_profile(name), name, processes)
    else:
        resolve_parallelism(None, recipe.sequence_parallel.size, processes)
    if (finished := check_machine(recipe.training)) is not None:
        return finished
    _check_resume(recipe.training)
    tokenizer = load_tokenizer(recipe)
    if recipe.data.chat_template is not None:
        _check_template(recipe.data.chat_template, tokenizer)
    build_config(recipe, tokenizer)
    if recipe.data.files is not None:
        load_documents(recipe.data)
    if recipe.validation is not None and recipe.validation.files is not None:
        try:
            load_documents(recipe.validation.data(recipe.data))
        except DataError as error:
            raise DataError(f"validation: {error}") from error
    return None


def check_machine(training: Mapping[str, Any]) -> str | None:
    """Check what may differ from machine to machine: the output folder and the trackers of a section `training`.

    Returns:
        a message if the run has already finished, else None.

    Raises:
        ValueError: see `check_output_dir` and `check_trackers`.
    """
    finished = check_output_dir(training)
    check_trackers(training)
    return finished


def _check_resume(training: Mapping[str, Any]) -> None:
    resume, folder = training.get("resume_from_checkpoint"), _output_dir(training)
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
    except TemplateSyntaxError as error:
        raise ValueError(
            f"data.chat_template must be a Jinja template, got {file!r}, line {error.lineno}: {error.message}; fix it"
        ) from error
    except TemplateError:
        return  # a valid template may refuse this conversation


def check_trackers(training: Mapping[str, Any]) -> None:
    """Raise ValueError if a tracker of `report_to` is unknown or not installed."""
    names = training.get("report_to")
    try:
        callbacks = get_reporting_integration_callbacks(names[0] if names in (["all"], ["none"]) else names)
    except ValueError as error:
        raise ValueError(f"training.report_to must name trackers, got {names}: {error}") from error
    try:
        for callback in callbacks:
            callback()
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"training.report_to must name installed trackers, got {names}: {error} Or set report_to: none"
        ) from error


def _output_dir(training: Mapping[str, Any]) -> Path:
    return Path(training.get("output_dir") or "trainer_output")  # transformers' default


def check_output_dir(training: Mapping[str, Any]) -> str | None:
    """Check that a run may write to its `output_dir`, and create the folder.

    Args:
        training: the section `training` of a recipe.

    Returns:
        a message if the folder holds this run, already finished, else None.

    Raises:
        ValueError: the folder cannot be written to, or holds another run that this one would replace.
    """
    folder = _output_dir(training)
    resume = training.get("resume_from_checkpoint") or None
    manifest.make_folder(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(manifest.not_writable(folder, error)) from error
    if training.get("overwrite_output_dir", False):
        if resume is None:
            return None
        raise ValueError(
            "overwrite_output_dir: true starts a new run and resume_from_checkpoint continues one, got both (with "
            f"{resume!r}); leave one of them out"
        )
    model, steps, remedy = next((name for name in MODELS if (folder / name).exists()), None), manifest.steps(folder), ""
    held = [] if model is None else [f"a model ({model})"]
    if resume in (True, manifest.LATEST):
        if model is not None and (reached := _reached(folder, training)) is not None:
            return f"nothing is left to train: {folder} holds this run's model, {reached}"
        if model is None or manifest.newest(folder) is not None:
            return None
        held.append("no complete checkpoint to resume from")
    else:
        if steps:
            held.append(f"checkpoints up to step {steps[0]}")
            remedy = ", set resume_from_checkpoint: latest to continue that run"
        if not held or (resume is not None and Path(resume).resolve().parent == folder.resolve()):
            return None
    raise ValueError(
        f"output_dir must not hold another run, which would be replaced, got {folder} with {' and '.join(held)}; "
        f"choose another folder{remedy}, or set overwrite_output_dir: true to replace it"
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
