"""The validation loss is the mean over all targets, however rows are distributed over processes and batches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments
from linear_llama3.trainer.data.files import DataError
from linear_llama3.trainer.data.training_rows import training_rows, without_share
from linear_llama3.trainer.recipes.recipe import DataRecipe, load_recipe
from tests.helpers.ranks import run_distributed
from tests.helpers.recipes import launch, recipe_with, write_corpus, write_tokenizer
from tests.helpers.training import GRIDS, arguments, reset_accelerate, rows, tiny_model


def mean_over_targets(model: LinearLlama3ForCausalLM, data: list[dict[str, Tensor]]) -> float:
    """Compute the loss row by row from the logits, in float64."""
    losses, targets = 0.0, 0
    for row in data:
        ids, labels = row["input_ids"][None], row["labels"]
        positions = row.get("position_ids", torch.arange(ids.shape[1]))
        with torch.no_grad():
            logits = model.double().eval()(input_ids=ids, position_ids=positions[None]).logits[0]
        losses += float(F.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
        targets += int((labels[1:] != -100).sum())
    return losses / targets


def evaluate(folder: str, degree: int, processes: int, packed: bool) -> list[dict[str, float]]:
    reset_accelerate()
    options = arguments(
        folder, 1, sequence_parallel_size=degree, eval_strategy="steps", eval_steps=1, learning_rate=0.0
    )
    trainer = LinearLlama3Trainer(
        model=tiny_model(),
        args=LinearLlama3TrainingArguments(**options),
        train_dataset=rows(packed),
        eval_dataset=rows(packed)[:7],
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


FAST = [(1, 1, False), (4, 2, True)]
GRIDS_AND_ROWS = [
    pytest.param(*case, marks=[pytest.mark.slow] * (case not in FAST))
    for case in ((*grid, packed) for grid in GRIDS for packed in (False, True))
]


@pytest.mark.parametrize(("processes", "degree", "packed"), GRIDS_AND_ROWS)
def test_the_mean_over_all_targets(processes: int, degree: int, packed: bool, tmp_path: Path) -> None:
    """Seven rows of 1 to 12 targets, two in a batch: the last batch is filled with rows that do not count."""
    expected = mean_over_targets(tiny_model(), rows(packed)[:7])
    arguments = (str(tmp_path), degree, processes, packed)
    results = [evaluate(*arguments)] if processes == 1 else run_distributed(evaluate, processes, *arguments)
    for logged in results:
        assert len(logged) == 2
        for entry in logged:
            assert entry["eval_loss"] == pytest.approx(expected, rel=1e-6)
            assert entry["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_recipe_with_validation_data(processes: int, tmp_path: Path) -> None:
    """By default a run validates ten times, here in each of two steps; the last loss is that of the saved model."""
    write_corpus(tmp_path / "corpus")
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "held_out.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("ab", "cdefghi", "j")))
    recipe = recipe_with(tmp_path, sequence_length=9, validation={"files": str(tmp_path / "held_out.jsonl")})
    recipe.write_text(recipe.read_text().replace("max_steps: 2", "max_steps: 2\n  learning_rate: 1e-2"))
    done = launch(recipe, processes, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2] and logged[0]["eval_loss"] != logged[1]["eval_loss"]
    held_out = training_rows(
        DataRecipe(files=str(tmp_path / "held_out.jsonl")), AutoTokenizer.from_pretrained(out), 9
    ).with_format("torch")
    expected = mean_over_targets(LinearLlama3ForCausalLM.from_pretrained(out), list(held_out))
    assert logged[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert logged[-1]["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    card = ModelCard.load(out / "README.md").text
    assert "| validation data | held_out.jsonl |" in card
    assert f"| validation loss | {expected:.4f} (perplexity {math.exp(expected):.4g}) at step 2; lowest" in card
    assert "Not evaluated beyond the validation loss" in card


def test_a_share_of_the_rows() -> None:
    """The same seed gives the same rows, each in one of the two parts, in their order."""
    data = Dataset.from_dict({"row": list(range(50))})
    parts = [without_share(data, share, seed) for share, seed in ((0.1, 0), (0.1, 0), (0.1, 1), (0.001, 0))]
    kept, held_out = [[list(part["row"]) for part in pair] for pair in zip(*parts, strict=True)]
    assert [len(rows) for rows in held_out] == [5, 5, 5, 1]
    assert held_out[0] == held_out[1] == sorted(held_out[0]) and held_out[0] != held_out[2]
    for training, validation in zip(kept, held_out, strict=True):
        assert training == [row for row in range(50) if row not in validation]
    with pytest.raises(DataError, match=r"must leave rows to train on, got 0\.9 of 2 rows; add documents"):
        without_share(data.select(range(2)), 0.9, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": {}}, "validation needs exactly one of share, files and dataset, got none"),
        ({"validation": {"share": 0.1, "files": "a"}}, "exactly one of .*, got share, files"),
        ({"validation": {"share": 1.0}}, "validation.share must lie between 0 and 1, got 1.0"),
        ({"validation": {"share": "half"}}, "share in validation must be a number or null, got 'half'"),
        ({"validation": {"file": "a"}}, "unknown key 'file' in validation; did you mean 'files'"),
        (
            {"validation": {"share": 0.1}, "training": {"eval_strategy": "no"}},
            "validation is never used with training.eval_strategy: no; leave one of them out",
        ),
        (
            {"validation": {"share": 0.1}, "data": {"files": "a", "streaming": True}, "training": {"max_steps": 2}},
            "validation.share needs stored rows, got data.streaming: true; name files or a dataset in validation",
        ),
        ({"training": {"eval_strategy": "epoch"}}, "needs a section validation, .* got eval_strategy: epoch; add it"),
    ],
)
def test_validation_that_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_with(tmp_path, **changes))


def test_when_a_recipe_validates(tmp_path: Path) -> None:
    path = recipe_with(tmp_path, validation={"files": "a"})

    def chosen(*changes: str) -> tuple[Any, ...]:
        args = load_recipe(path, changes).training_arguments()
        return args.eval_strategy.value, args.eval_steps, args.per_device_eval_batch_size

    assert chosen() == ("steps", 0.1, 1)
    assert chosen("training.eval_steps=50", "training.per_device_train_batch_size=4") == ("steps", 50, 4)
    assert chosen("training.eval_strategy=epoch", "training.per_device_eval_batch_size=3")[::2] == ("epoch", 3)
    data = load_recipe(path, ["data.streaming=true", "data.text_column=body", "data.arguments={encoding: utf-16}"])
    assert data.validation is not None
    read = data.validation.data(data.data)
    assert (read.files, read.streaming, read.text_column, read.arguments) == (
        "a",
        False,
        "body",
        {"encoding": "utf-16"},
    )
