"""TRL's SFTTrainer, alone and with sequence parallelism: training on padded, packed and padding-free batches equals
training on every document alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer, pack_dataset

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.trainer import SequenceParallelMixin
from tests.helpers.adapters import adapted
from tests.helpers.checkpoint import TEXTS, assert_documents_alone, documents, load, loss_alone, tokenizer
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed
from tests.helpers.training import outcome, reset_accelerate

LEARNING_RATE = 0.05
BATCHES: dict[str, dict[str, Any]] = {
    "padded": {"max_length": 64},
    "packing": {"max_length": 64, "packing": True},
    "padding-free": {"max_length": None, "padding_free": True},
    "packed before": {"max_length": None, "padding_free": True},  # by trl.pack_dataset
}


class ShardedSFTTrainer(SequenceParallelMixin, SFTTrainer):
    """The class in the documentation."""


def fine_tune(
    checkpoint: str, folder: str, batches: str, sharded: bool = False, checkpointing: bool = False, lora: bool = False
) -> dict[str, Any]:
    """Two steps of gradient descent, each on all documents, between two evaluations."""
    reset_accelerate()
    data = Dataset.from_dict({"text": TEXTS})
    if batches == "packed before":
        data = pack_dataset(Dataset.from_dict({"input_ids": [row.tolist() for row in documents(checkpoint)]}), 64)
    args = SFTConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        max_steps=2,
        per_device_train_batch_size=len(TEXTS),
        per_device_eval_batch_size=len(TEXTS),
        learning_rate=LEARNING_RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        gradient_checkpointing=checkpointing,
        include_num_input_tokens_seen="all",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **BATCHES[batches],
    )
    trainer = (ShardedSFTTrainer if sharded else SFTTrainer)(
        model=adapted(checkpoint) if lora else checkpoint,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(checkpoint),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    reset_accelerate()
    logs = [log for log in trainer.state.log_history if "mean_token_accuracy" in log]
    metrics = [tuple(log[name] for name in ("num_tokens", "mean_token_accuracy", "entropy")) for log in logs]
    return {**outcome(trainer), "eval": (before, after), "metrics": metrics}


def assert_right(runs: list[dict[str, Any]], checkpoint: Path, batches: str, *, lora: bool = False) -> None:
    """Evaluation and training equal those of documents alone."""
    model, rows = (adapted if lora else load)(checkpoint), documents(checkpoint)
    lengths = [len(row) for row in rows]
    for run in runs:
        assert run["tokens"] == 2 * (len(rows) * max(lengths) if batches == "padded" else sum(lengths))
        assert run["eval"][0] == pytest.approx(loss_alone(model, rows).item(), rel=1e-6)
    assert_documents_alone(runs, model, rows, LEARNING_RATE)
    for run in runs:
        assert run["eval"][1] == pytest.approx(loss_alone(model, rows).item(), rel=1e-5)


@slow_unless(lambda batches: batches == "packing", batches=["padded", "packing", "padding-free"])
def test_sft_trainer_equals_documents_alone(batches: str, checkpoint: Path, tmp_path: Path) -> None:
    runs = run_distributed(fine_tune, 1, str(checkpoint), str(tmp_path), batches)
    assert_right(runs, checkpoint, batches)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(saved) is LinearLlama3ForCausalLM
    assert (saved.lm_head.weight.numpy(force=True) == runs[0]["parameters"]["model.embed_tokens.weight"]).all()


@pytest.mark.parametrize(
    ("batches", "checkpointing", "lora"),
    [
        ("padded", True, False),
        pytest.param("padding-free", False, False, marks=pytest.mark.slow),
        ("packed before", True, True),
    ],
    ids=["padded, checkpointing", "padding-free", "packed before, checkpointing, LoRA"],
)
def test_sequence_parallel_sft_trainer_equals_documents_alone(
    batches: str, checkpointing: bool, lora: bool, checkpoint: Path, tmp_path: Path
) -> None:
    runs = run_distributed(fine_tune, 2, str(checkpoint), str(tmp_path), batches, True, checkpointing, lora)
    assert_right(runs, checkpoint, batches, lora=lora)


@slow_unless(lambda batches: batches == "padding-free", batches=["padded", "padding-free"])
def test_metrics_equal_those_of_one_process(batches: str, checkpoint: Path, tmp_path: Path) -> None:
    (one,) = run_distributed(fine_tune, 1, str(checkpoint), str(tmp_path), batches)
    assert len(one["metrics"]) == 2 and 0 < one["metrics"][0][0] < one["metrics"][1][0]
    for run in run_distributed(fine_tune, 2, str(checkpoint), str(tmp_path), batches, True):
        for got, expected in zip(run["metrics"], one["metrics"], strict=True):
            assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_the_mixin_changes_nothing_on_one_process(checkpoint: Path, tmp_path: Path) -> None:
    runs = run_distributed(fine_tune, 1, str(checkpoint), str(tmp_path), "packing", True)
    assert_right(runs, checkpoint, "packing")


def refusal(checkpoint: str, folder: str) -> str:
    try:
        fine_tune(checkpoint, folder, "packing", sharded=True)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_trl_refuses_its_own_packing_under_sequence_parallelism(checkpoint: Path, tmp_path: Path) -> None:
    """Rows have to be packed before, as above."""
    for message in run_distributed(refusal, 2, str(checkpoint), str(tmp_path)):
        assert "Packing is not compatible with context parallelism" in message
