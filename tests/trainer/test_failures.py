"""Failures that are injected into launches and runs: what is said, the exit code, and what is left of the checkpoints."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_llama3.trainer import LinearLlama3TrainingArguments, checkpoints
from tests.launching import launch
from tests.trainer.test_exactness import SequentialTrainer, arguments, rows, tiny_model

REACHED = 1  # the last step with a checkpoint


class FailingTrainer(SequentialTrainer):
    """Fails on rank 1 (a full disk on rank 0) in the step, or the save, behind the first checkpoint."""

    kind = ""

    @property
    def _now(self) -> bool:
        return self.state.global_step == REACHED

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self._now and self.args.process_index == 1:
            if self.kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "hangs":
                time.sleep(6)
            if self.kind == "out of memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            if self.kind == "error":
                raise KeyError("something")
        return super().training_step(model, inputs, *args, **kwargs)

    def _save_scaler(self, output_dir: str) -> None:
        """In the middle of a save."""
        if self.state.global_step == REACHED + 1:
            if self.kind == "killed in a save" and self.args.process_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "full disk" and self.args.process_index == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super()._save_scaler(output_dir)


def fail(kind: str, folder: str) -> None:
    keywords = arguments(folder, 1, sequence_parallel_size=2, save_strategy="steps", save_steps=1, max_steps=4)
    args = LinearLlama3TrainingArguments(**keywords, ddp_timeout=2 if kind == "hangs" else 60)
    trainer = FailingTrainer(model=tiny_model(), args=args, train_dataset=rows(False))
    trainer.kind = kind
    trainer.train()


@pytest.mark.parametrize(
    ("kind", "rank", "messages"),
    [
        ("killed", 0, ["step 2, rank 0 of 2: rank 1 has ended without a word, as if killed"]),
        ("killed in a save", 0, ["step 3, rank 0 of 2: rank 1 has ended without a word, as if killed"]),
        ("hangs", 0, ["step 2, rank 0 of 2: rank 1 did not answer within ddp_timeout = 2 s", "raise ddp_timeout"]),
        (
            "full disk",
            0,
            ["step 2, rank 0 of 2: ", "could not be written: [Errno 28] No space left", "save_total_limit"],
        ),
        (
            "out of memory",
            1,
            [
                "step 2, rank 1 of 2: out of memory. The batch has 2 x 13 tokens over 2 ranks, 7 of every row on each",
                "gradient_checkpointing=True",
                "sequence_parallel_size=4 on 4 processes, 4 tokens a rank",
            ],
        ),
        ("error", 1, ["step 2, rank 1 of 2: the run cannot go on", "KeyError: 'something'"]),
    ],
)
def test_a_launch_ends_with_the_reason(kind: str, rank: int, messages: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    start = time.monotonic()
    ended = launch(fail, 2, kind, str(out), folder=tmp_path / "log")
    assert ended.exit_code != 0 and time.monotonic() - start < 60
    whole = f"{out / 'checkpoint-1'} is whole: resume_from_checkpoint=True goes on from there"
    for message in [*messages, whole]:
        assert message in ended.errors[rank], ended.errors[rank][-2000:]
    if not kind.startswith("killed"):  # the other rank says whose failure it was, and which one
        other = "KeyError: 'something'" if kind == "error" else messages[0].partition(": ")[2][:30]
        assert f"step {3 if kind == 'full disk' else 2}, rank {1 - rank} of 2: another rank" in ended.errors[1 - rank]
        assert other in ended.errors[1 - rank], ended.errors[1 - rank][-2000:]
    assert checkpoints.newest(out) == out / "checkpoint-1"
    if kind in ("killed in a save", "full disk"):
        assert checkpoints.problem(out / "checkpoint-2") == "its save did not come to an end"
