"""Trainer methods that users override see one rank's part of a batch: they are refused, or correct."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from linear_llama3.trainer import LinearLlama3TrainingArguments, SequenceParallelMixin
from tests.helpers.adaptive import profile_file
from tests.helpers.ranks import run_distributed
from tests.helpers.training import SequentialTrainer, arguments, outcome, reset_accelerate, rows, tiny_model


def shifted_cross_entropy(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """An override as in transformers' documentation."""
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    logits = outputs.logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()), outputs


class OwnLoss(SequentialTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = shifted_cross_entropy(model, inputs)
        return (loss, outputs) if return_outputs else loss


class OwnLossBelow(SequenceParallelMixin, type("Below", (Trainer,), {"compute_loss": OwnLoss.compute_loss})):  # type: ignore[misc]
    """A base class below the mixin with a different loss."""


class OwnInputs(SequentialTrainer):
    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs(inputs)


class Declared(SequentialTrainer):
    """Twice the loss."""

    handles_shards = True

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


class Heir(Declared):
    """A subclass must declare `handles_shards` for its own overrides."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return shifted_cross_entropy(model, inputs)[0]


class OwnPrediction(SequentialTrainer):
    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, _ = shifted_cross_entropy(model, inputs)
        return loss, None, None


class Smoothing(SequentialTrainer):
    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.label_smoother = shifted_cross_entropy
        return super().train(*args, **kwargs)


class OwnLossFunction(SequentialTrainer):
    """The remedy gives the loss of one process, on shards too."""


CLASSES = (OwnLoss, OwnLossBelow, OwnInputs, Declared, Heir, OwnPrediction, Smoothing, OwnLossFunction)


def squared(logits: Tensor, labels: Tensor, *, num_items_in_batch: Any, shift_labels: Any = None, **_: Any) -> Tensor:
    """The mean square of -log p."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.square().sum() / num_items_in_batch


def run(name: str, changes: dict[str, Any], replicas: int, folder: str) -> Any:
    """Return the losses of two steps, or the error."""
    reset_accelerate()
    [cls] = [cls for cls in CLASSES if cls.__name__ == name]
    model = tiny_model()
    if cls is OwnLossFunction:
        model.loss_function = squared
        changes = {**changes, "chunked_loss": False}
    args = LinearLlama3TrainingArguments(**arguments(folder, replicas, **changes))
    try:
        trainer = cls(model=model, args=args, train_dataset=rows(False))
        trainer.train()
        if cls is OwnPrediction:
            trainer.evaluate(rows(False))
        return [loss for loss, _ in outcome(trainer)["history"]]
    except ValueError as error:
        return str(error)
    finally:
        reset_accelerate()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OwnLoss", "compute_loss must know that a rank holds a part of every sequence, got OwnLoss's own"),
        ("OwnLossBelow", "compute_loss must know that a rank holds a part of every sequence, got Below's own"),
        ("OwnInputs", "_prepare_inputs must know that a rank holds a part of every sequence, got OwnInputs's own"),
        ("Heir", "got Heir's own; set model.loss_function instead"),
        ("OwnPrediction", "call context.shard_batch"),
        ("Smoothing", "label_smoother is not possible under sequence parallelism"),
    ],
)
def test_refused_on_shards(name: str, message: str, tmp_path: Path) -> None:
    texts = run_distributed(run, 2, name, {}, 1, str(tmp_path))
    assert all(isinstance(text, str) and message in text for text in texts), texts


def test_refused_in_adaptive_groups(tmp_path: Path) -> None:
    profile = profile_file(tmp_path, "hybrid", 2)
    changes = {"sequence_parallel_size": "adaptive", "planner_profile": profile, "gradient_accumulation_steps": 1}
    for text in run_distributed(run, 2, "OwnLoss", changes, 1, str(tmp_path)):
        assert "compute_loss must know that a rank holds a part of every sequence, got OwnLoss's own" in text


def test_allowed_where_sequences_are_complete(tmp_path: Path) -> None:
    """With data parallelism only, transformers' documented way works."""
    for losses in run_distributed(run, 2, "OwnLoss", {"sequence_parallel_size": 1}, 2, str(tmp_path)):
        assert isinstance(losses, list) and len(losses) == 2


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param("Declared", marks=pytest.mark.slow), "OwnLossFunction"])
def test_right_on_shards(name: str, world: int, tmp_path: Path) -> None:
    (one,) = run_distributed(run, 1, name, {}, 1, str(tmp_path))
    for losses in run_distributed(run, world, name, {"sequence_parallel_size": 2}, world // 2, str(tmp_path)):
        assert losses == pytest.approx(one, rel=2e-4)
