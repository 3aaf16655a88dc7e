"""NEFTune on parts of sequences: noise of the right strength, different on every rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.trainer import LinearLlama3TrainingArguments, SequenceParallelMixin
from tests.helpers.adaptive import one_row, profile_file, tiny_model
from tests.helpers.ranks import run_distributed
from tests.helpers.training import SequentialTrainer, arguments, reset_accelerate

ALPHA, LENGTH, ROWS = 5.0, 301, 2


class MixedIn(SequenceParallelMixin, Trainer):
    """A Trainer with plain TrainingArguments, as in TRL."""


def rows(packed: bool, length: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(20, (2 * ROWS, length), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(100), torch.arange(LENGTH - 100)])
    return [{"input_ids": x, "labels": x, **({"position_ids": positions} if packed else {})} for x in ids]


def record(model: LinearLlama3ForCausalLM) -> list[np.ndarray]:
    """Record the noise that every training pass adds to the embeddings `[B, C, D]`."""
    noises: list[np.ndarray] = []
    tokens: list[Tensor] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))

    def note(module: Any, args: Any, kwargs: Any) -> None:
        if module.training:
            clean = torch.nn.functional.embedding(tokens[-1], embedding.weight)
            noises.append((args[0] - clean).detach().numpy())

    model.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    return noises


def train(
    cls: type, packed: bool, folder: str, profile: str | None = None, length: int = LENGTH
) -> tuple[list[np.ndarray], tuple[Any, int]]:
    """Return the noise of all passes, and then the setting and the remaining hooks."""
    reset_accelerate()
    model = tiny_model("hybrid")
    noises = record(model)
    settings: dict[str, Any] = {"neftune_noise_alpha": ALPHA, "gradient_accumulation_steps": 1}
    settings |= {"per_device_train_batch_size": ROWS, "per_device_eval_batch_size": ROWS, "learning_rate": 1e-3}
    keywords: dict[str, Any] = {}
    if profile is not None:
        settings |= {"sequence_parallel_size": "adaptive", "planner_profile": profile, "per_device_train_batch_size": 1}
        keywords["data_collator"] = one_row
    kind = TrainingArguments if cls is MixedIn else LinearLlama3TrainingArguments
    trainer = cls(
        model=model, args=kind(**arguments(folder, 1, **settings)), train_dataset=rows(packed, length), **keywords
    )
    trainer.train()
    if profile is None:
        trainer.evaluate(rows(packed, length))
    reset_accelerate()
    return noises, (trainer.neftune_noise_alpha, len(model.get_input_embeddings()._forward_hooks))


def assert_strength(noise: np.ndarray, length: int) -> None:
    """Check that noise is uniform up to alpha / sqrt(L * D)."""
    bound = ALPHA / math.sqrt(length * noise.shape[-1])
    assert 0.98 * bound < abs(noise).max() < 1.001 * bound
    assert noise.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(noise.mean()) < 0.05 * bound


@pytest.mark.parametrize(
    ("cls", "packed"),
    [
        pytest.param(SequentialTrainer, False, id="rows"),
        pytest.param(MixedIn, True, id="mixin-packed"),
        pytest.param(SequentialTrainer, True, id="packed", marks=pytest.mark.slow),
        pytest.param(MixedIn, False, id="mixin-rows", marks=pytest.mark.slow),
    ],
)
def test_strength(cls: type, packed: bool, tmp_path: Path) -> None:
    """The noise has the distribution of one process with rows of LENGTH tokens, packed or not."""
    for world in (1, 4):
        runs = run_distributed(train, world, cls, packed, str(tmp_path))
        for noises, left in runs:
            assert len(noises) == 2 and left == (ALPHA, 0)
            for noise in noises:
                assert_strength(noise, LENGTH)
        drawn = [noise.flatten()[: noises[0].size] for noises, _ in runs for noise in noises]
        correlations = np.corrcoef(drawn) - np.eye(len(drawn))
        assert abs(correlations).max() < 0.15, "every rank and step draws its own"


def test_strength_in_adaptive_groups(tmp_path: Path) -> None:
    """Two devices share each row of 30 tokens, in four chunks of 8."""
    bound = ALPHA / math.sqrt(30 * 16)
    profile = profile_file(tmp_path, "hybrid", 2)
    for noises, left in run_distributed(train, 2, SequentialTrainer, False, str(tmp_path), profile, 30):
        assert len(noises) == 4 and left == (ALPHA, 0)
        for noise in noises:
            assert noise.shape == (1, 16, 16) and 0.95 * bound < abs(noise).max() < 1.001 * bound
