"""SIGTERM ends a run after a step that all ranks save."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import TrainerCallback

from linear_llama3.trainer.checkpoints import manifest as checkpoints
from tests.helpers.failures import assert_same_run, cannot_resume, failing
from tests.helpers.launch import launch
from tests.helpers.ranks import run_distributed
from tests.helpers.training import outcome, reset_accelerate


class SignalToOneRank(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class SignalToLoaders(TrainerCallback):
    """In a slow run that shows how far it is."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Path(args.output_dir, f"step-{state.global_step}").touch()
        time.sleep(0.1)
        workers = psutil.Process().children()
        assert workers
        if state.global_step == 1:
            for worker in workers:
                worker.terminate()


def preempted(kind: str, callback: type[TrainerCallback], folder: str, **changes: Any) -> None:
    trainer = failing(kind, folder, save_steps=100, **changes)
    trainer.add_callback(callback)
    trainer.train()


def preempted_here(folder: str) -> Any:
    """Return the exit code of the run; the process continues."""
    reset_accelerate()
    try:
        preempted("", SignalToOneRank, folder)
    except SystemExit as exit:
        return exit.code
    finally:
        reset_accelerate()
    return None


def resumed(folder: str) -> dict[str, Any]:
    reset_accelerate()
    trainer = failing("", folder)
    trainer.train(resume_from_checkpoint=True)
    reset_accelerate()
    return outcome(trainer)


@cannot_resume
def test_sigterm_saves_at_the_same_step_on_all_ranks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_distributed(preempted_here, 2, str(out)) == [143, 143]
    assert checkpoints.steps(out) == [2] and checkpoints.newest(out) == out / "checkpoint-2"
    for run in run_distributed(resumed, 2, str(out)):
        assert_same_run(run, tmp_path)


@pytest.mark.slow
def test_sigterm_to_a_launch(tmp_path: Path) -> None:
    """From the scheduler to torchrun, from there to the ranks, from wherever to the loader's workers."""
    out = tmp_path / "out"
    started = out / "step-3"
    ended = launch(launched, 2, str(out), folder=tmp_path / "log", interrupt=started.exists)
    (step,) = checkpoints.steps(out)
    assert ended.exit_code != 0 and 3 <= step < 100 and checkpoints.find_defect(out / f"checkpoint-{step}") is None
    assert f"SIGTERM: step {step} is saved in {out}" in ended.errors[0], ended.errors[0][-2000:]
    assert "Traceback" not in ended.errors[0] + ended.errors[1]
    saved = (out / f"checkpoint-{step}" / checkpoints.MANIFEST_NAME).stat().st_mtime
    assert time.time() - saved < 25, "some process had to be killed, torchrun's 30 s later"


def launched(folder: str) -> None:
    preempted("long", SignalToLoaders, folder, max_steps=100, dataloader_num_workers=1)
