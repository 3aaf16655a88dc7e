"""The mixins of the Trainer: one job each, and nothing of transformers or accelerate patched."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from linear_llama3.trainer import (
    LinearLlama3Trainer,
    LinearLlama3TrainingArguments,
    ReliabilityMixin,
    SequenceParallelAccelerator,
    SequenceParallelMixin,
)
from linear_llama3.trainer.checkpoints import manifest
from linear_llama3.trainer.hooks import TRAINER_HOOKS
from tests.helpers.ranks import run_distributed
from tests.helpers.training import arguments, outcome, reset_accelerate, rows, tiny_model


class Sharded(SequenceParallelMixin, Trainer):
    """Sharding alone."""


class Reliable(ReliabilityMixin, Trainer):
    """Reliability alone."""


class Both(SequenceParallelMixin, ReliabilityMixin, Trainer):
    """The mixins in another order than in LinearLlama3Trainer."""


CLASSES: dict[str, Any] = {"sharded": Sharded, "reliable": Reliable, "both": Both}


def test_no_hook_is_overridden_by_more_than_two_classes() -> None:
    owners = {
        name: [
            c.__name__ for c in LinearLlama3Trainer.__mro__ if c.__module__.startswith("linear_") and name in vars(c)
        ]
        for name in TRAINER_HOOKS
    }
    assert all(1 <= len(classes) <= 2 for name, classes in owners.items() if name != "_prepare_inputs"), owners


def train(kind: str, folder: str, checkpoint: str | None, steps: int = 2) -> dict[str, Any]:
    reset_accelerate()
    before = signal.getsignal(signal.SIGTERM)
    settings = arguments(folder, 1, save_strategy="steps", save_steps=1, max_steps=steps, learning_rate=0.1)
    args = TrainingArguments(**settings, enable_jit_checkpoint=kind != "sharded")
    trainer = CLASSES[kind](model=tiny_model(), args=args, train_dataset=rows(False))
    assert args.enable_jit_checkpoint == (kind != "sharded") and signal.getsignal(signal.SIGTERM) is before
    trainer.train(resume_from_checkpoint=checkpoint)
    reset_accelerate()
    return outcome(trainer)


@pytest.mark.parametrize("kind", CLASSES)
def test_only_the_reliability_mixin_writes_manifests_and_resumes_from_latest(kind: str, tmp_path: Path) -> None:
    (complete,) = run_distributed(train, 1, kind, str(tmp_path), None)
    folder = tmp_path / "checkpoint-1"
    assert (folder / manifest.MANIFEST_NAME).is_file() == (kind != "sharded")
    if kind != "sharded":
        (tmp_path / "checkpoint-2" / "model.safetensors").unlink()
        (resumed,) = run_distributed(train, 1, kind, str(tmp_path), manifest.LATEST)
        assert resumed["history"][-1] == pytest.approx(complete["history"][-1], rel=1e-5)


def patched_attributes(folder: str) -> list[str]:
    """Return the methods of the Accelerator and the Trainer that an instance attribute hides."""
    reset_accelerate()
    trainer = LinearLlama3Trainer(
        model=tiny_model(), args=LinearLlama3TrainingArguments(**arguments(folder, 1)), train_dataset=rows(False)
    )
    trainer.train()
    assert type(trainer.accelerator) is SequenceParallelAccelerator
    hidden = [
        f"{type(owner).__name__}.{name}"
        for owner in (trainer, trainer.accelerator)
        for name in vars(owner)
        if callable(getattr(type(owner), name, None))
    ]
    reset_accelerate()
    return hidden


def test_nothing_is_patched(tmp_path: Path) -> None:
    assert run_distributed(patched_attributes, 2, str(tmp_path)) == [[], []]
