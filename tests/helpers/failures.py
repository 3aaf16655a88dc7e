"""A Trainer that fails in a chosen way, and the run that it must equal after a resume."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from linear_llama3.trainer import LinearLlama3TrainingArguments
from tests.helpers.ranks import run_distributed
from tests.helpers.training import SequentialTrainer, arguments, outcome, reset_accelerate, rows, tiny_model

REACHED = 1  # the last step with a checkpoint
STEPS = 4


class FailingTrainer(SequentialTrainer):
    """Fails on the last rank (a full disk on rank 0) in the step, or the save, after the first checkpoint."""

    handles_shards = True
    kind = ""

    @property
    def fails(self) -> bool:
        return self.args.process_index == self.args.world_size - 1

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == REACHED and self.fails:
            if self.kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "hangs":
                time.sleep(6)
            if self.kind == "out of memory":
                torch.empty(1 << 50, dtype=torch.uint8)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        broken = self.state.global_step == REACHED and self.fails and self.kind == "not a number"
        return loss * float("nan") if broken else loss

    def _save_scaler(self, output_dir: str) -> None:
        """In the middle of a save."""
        if self.state.global_step == REACHED + 1:
            if self.kind == "killed in a save" and self.fails and first_attempt():
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "full disk" and self.args.process_index == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super()._save_scaler(output_dir)


class RemoteRows(torch.utils.data.Dataset):
    """Cannot be reached from the last rank in the second step (its last batch: the loader is one batch ahead)."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if index >= 6 and int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"]):
            raise ConnectionError("Max retries exceeded with url: /data")
        return rows(False)[index]


def first_attempt() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def failing(kind: str, folder: str, **changes: Any) -> FailingTrainer:
    keywords = arguments(folder, 1, sequence_parallel_size="auto", save_strategy="steps", save_steps=1, max_steps=STEPS)
    keywords |= {"learning_rate": 0.01, "optim": "adamw_torch", **changes}
    args = LinearLlama3TrainingArguments(**keywords, ddp_timeout=2 if kind == "hangs" else 60)
    data = RemoteRows() if kind == "unreachable data" else rows(False) * (50 if kind == "long" else 1)
    trainer = FailingTrainer(model=tiny_model(), args=args, train_dataset=data)
    trainer.kind = kind
    return trainer


def uninterrupted_run(folder: str) -> dict[str, Any]:
    reset_accelerate()
    trainer = failing("", folder)
    trainer.train()
    reset_accelerate()
    return outcome(trainer)


cannot_resume = pytest.mark.skipif(
    transformers.__version__.startswith("5.17."), reason="transformers 5.17 cannot resume on several CPU processes"
)


def assert_same_run(run: dict[str, Any], tmp_path: Path) -> None:
    complete = run_distributed(uninterrupted_run, 2, str(tmp_path / "uninterrupted"))[0]
    for got, expected in zip(run["history"], complete["history"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
    for name, expected in complete["parameters"].items():
        assert abs(run["parameters"][name] - expected).max() < 1e-5, name
