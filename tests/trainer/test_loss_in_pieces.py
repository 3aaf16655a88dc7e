"""Neither the loss without logits nor tiles change a run; logits are computed where something reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from linear_llama3.ops import token_tiles
from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments
from tests.helpers.ranks import run_distributed
from tests.helpers.training import (
    SequentialTrainer,
    arguments,
    assert_same,
    outcome,
    reset_accelerate,
    rows,
    tiny_model,
)


def make(folder: str, degree: int = 1, world: int = 1, adapters: bool = False, **changes: Any) -> LinearLlama3Trainer:
    data = changes.pop("data", rows(False))
    more = {name: changes.pop(name) for name in ("compute_metrics", "compute_loss_func") if name in changes}
    model: Any = tiny_model()
    if adapters:
        import peft

        torch.manual_seed(1)
        targets = ["q_proj", "down_proj", "lm_head"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    changes = {"sequence_parallel_size": degree, **changes}
    args = LinearLlama3TrainingArguments(**arguments(folder, world // degree, **changes))
    return SequentialTrainer(model=model, args=args, train_dataset=data, eval_dataset=data[:6], **more)


def run(
    folder: str, world: int, degree: int, accumulation: int, adapters: bool, packed: bool, tiled: bool
) -> dict[str, Any]:
    """Two steps of 4 rows and an evaluation; tiles of three tokens in the loss, and of two in the layers."""
    reset_accelerate()
    token_tiles.TILE_NUMBERS, before = 3 * 23, token_tiles.TILE_NUMBERS
    changes: dict[str, Any] = dict.fromkeys(("chunked_loss", "sequence_tiling", "gradient_checkpointing"), tiled)
    changes |= {"gradient_accumulation_steps": accumulation, "learning_rate": 0.1}
    changes["per_device_train_batch_size"] = 4 * degree // world // accumulation
    trainer = make(folder, degree, world, adapters, data=rows(packed), prediction_loss_only=True, **changes)
    seen: list[bool] = []
    model: Any = trainer.model.get_base_model() if adapters else trainer.model
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits is None))
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    token_tiles.TILE_NUMBERS = before
    reset_accelerate()
    assert seen and all(skipped == tiled for skipped in seen)
    return {**outcome(trainer), "eval": evaluated}


ALL_GRIDS = [(1, 1, 4), (2, 2, 2), (2, 1, 1), (4, 2, 2), (4, 4, 1), (4, 4, 4)]  # (processes, degree, accumulation)


@pytest.mark.parametrize(
    ("grids", "packed", "adapters"),
    [
        pytest.param([(2, 2, 2)], True, True, id="packed-lora"),
        pytest.param([(4, 2, 2)], False, False, id="rows"),
        *(
            pytest.param(ALL_GRIDS, packed, adapters, id=f"{packed=}-{adapters=}-all_grids", marks=pytest.mark.slow)
            for packed in (False, True)
            for adapters in (False, True)
        ),
    ],
)
def test_any_grid_with_tiles_equals_one_process_without(
    grids: list[tuple[int, int, int]], packed: bool, adapters: bool, tmp_path: Path
) -> None:
    if adapters:
        pytest.importorskip("peft")
    folder = str(tmp_path)
    (one,) = run_distributed(run, 1, folder, 1, 1, 1, adapters, packed, False)
    for world, degree, accumulation in grids:
        for other in run_distributed(run, world, folder, world, degree, accumulation, adapters, packed, True):
            assert_same(other, one, (world, degree, accumulation))
            assert other["eval"] == pytest.approx(one["eval"], rel=1e-5)
            assert np.ravel(other["history"]) == pytest.approx(np.ravel(one["history"]), rel=1e-5)


def test_an_evaluation_with_metrics_has_its_logits(tmp_path: Path) -> None:
    shapes = []

    def compute_metrics(p: Any) -> dict[str, float]:
        shapes.append(p.predictions.shape)
        return {}

    trainer = make(str(tmp_path), compute_metrics=compute_metrics)
    loss = trainer.evaluate()["eval_loss"]
    assert shapes == [(6, 13, 23)]
    assert loss == pytest.approx(make(str(tmp_path), chunked_loss=False).evaluate()["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("reader", ["label smoothing", pytest.param("compute_loss_func", marks=pytest.mark.slow)])
def test_what_reads_logits_in_training_has_them(reader: str, tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
        assert outputs["logits"].shape == (2, 13, 23)
        return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())

    changes: dict[str, Any] = {"label_smoothing_factor": 0.1} if "smooth" in reader else {"compute_loss_func": loss}
    runs = []
    for chunked in (True, False):
        trainer = make(str(tmp_path), chunked_loss=chunked, **changes)
        trainer.train()
        runs.append(outcome(trainer)["history"])
    assert runs[0] == runs[1]


def test_models_without_such_a_loss_are_left_alone(tmp_path: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()
            self.config = self.inner.config

        def forward(self, input_ids: Any, labels: Any, skip_logits: bool = False) -> Any:
            assert not skip_logits
            return self.inner(input_ids=input_ids, labels=labels)

    args = LinearLlama3TrainingArguments(**arguments(str(tmp_path), 1))
    trainer = LinearLlama3Trainer(model=Other(), args=args, train_dataset=rows(False))
    trainer.train()
    assert trainer.state.global_step == 2


def test_model_init_makes_a_model_with_tiles(tmp_path: Path) -> None:
    args = LinearLlama3TrainingArguments(**arguments(str(tmp_path), 1, sequence_tiling=True))
    trainer = LinearLlama3Trainer(model_init=tiny_model, args=args, train_dataset=rows(False))
    trainer.train()
    assert trainer.model.model.layers[0].sequence_tiling
    with pytest.raises(ValueError, match="Linear has none"):
        LinearLlama3Trainer(model=nn.Linear(1, 1), args=args, train_dataset=rows(False))
