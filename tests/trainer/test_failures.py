"""Failures that are injected into launches and runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from linear_llama3.trainer import LinearLlama3TrainingArguments
from linear_llama3.trainer.checkpoints import manifest as checkpoints
from linear_llama3.trainer.failures import FailureStore, TrainingFailure, _describe_lost_rank, _less_memory
from tests.helpers.failures import STEPS, assert_same_run, cannot_resume, failing
from tests.helpers.launch import launch
from tests.helpers.ranks import run_distributed
from tests.helpers.training import SequentialTrainer, arguments, outcome, reset_accelerate, rows, tiny_model


def fail(kind: str, folder: str) -> None:
    failing(kind, folder).train()


@pytest.mark.parametrize(
    ("kind", "rank", "messages"),
    [
        (
            "killed",
            0,
            ["step 2, rank 0 of 2: rank 1 exited without an error message (killed?", "RECIPE.yaml --dry-run` computes"],
        ),
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
        (
            "unreachable data",
            1,
            ["step 2, rank 1 of 2: the data could not be read: ConnectionError: Max retries", "can be reached from"],
        ),
    ],
)
@pytest.mark.slow
def test_a_launch_ends_with_the_reason(kind: str, rank: int, messages: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = launch(fail, 2, kind, str(out), folder=tmp_path / "log")
    assert ended.exit_code != 0
    complete = f"{out / 'checkpoint-1'} is complete: resume_from_checkpoint=True continues from it"
    for message in [*messages, complete]:
        assert message in ended.errors[rank], ended.errors[rank][-2000:]
    if kind != "killed":  # the other rank says whose failure it was, and which one
        step = 3 if kind == "full disk" else 2
        expected = f"step {step}, rank {1 - rank} of 2: another rank has failed: {messages[0][:30]}"
        assert kind == "hangs" or expected in ended.errors[1 - rank], ended.errors[1 - rank][-2000:]
    assert checkpoints.newest(out) == out / "checkpoint-1"
    if kind == "full disk":
        assert checkpoints.find_defect(out / "checkpoint-2") == "its save did not finish"


def fail_alone(kind: str, folder: str) -> str:
    reset_accelerate()
    try:
        fail(kind, folder)
    except Exception as error:
        return str(error)
    finally:
        reset_accelerate()
    return ""


@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        ("full disk", ["could not be written: [Errno 28] No space left on device", "save_total_limit"]),
        (
            "out of memory",
            ["step 2, rank 0 of 1: out of memory. The batch has 2 x 13 tokens over 1 ranks, 13 of every"],
        ),
        ("unreachable data", ["step 2, rank 0 of 1: the data could not be read: ConnectionError: Max retries"]),
    ],
)
def test_a_failure_on_one_process_names_step_and_checkpoint(kind: str, messages: list[str], tmp_path: Path) -> None:
    (error,) = run_distributed(fail_alone, 1, kind, str(tmp_path))
    complete = f"{tmp_path / 'checkpoint-1'} is complete: resume_from_checkpoint=True continues from it"
    for message in [*messages, complete]:
        assert message in error
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-1"
    if kind == "full disk":
        assert checkpoints.find_defect(tmp_path / "checkpoint-2") == "its save did not finish"


def fail_before_the_save_is_complete(folder: str) -> str:
    reset_accelerate()
    complete = checkpoints.finish

    def finish(saved: Path, facts: dict[str, Any]) -> None:
        if saved.name != "checkpoint-1":
            raise OSError("no manifest")
        complete(saved, facts)

    try:
        with patch.object(checkpoints, "finish", finish):
            failing("", folder, save_total_limit=1).train()
    except TrainingFailure as error:
        return str(error)
    finally:
        reset_accelerate()
    return ""


def test_older_checkpoints_stay_until_the_new_one_is_complete(tmp_path: Path) -> None:
    (error,) = run_distributed(fail_before_the_save_is_complete, 1, str(tmp_path))
    assert "checkpoint-2 could not be written: no manifest" in error
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-1"


def describe_lost_rank(cause: str | None, error: str, folder: str) -> str:
    """Return what rank 0 says of a collective without rank 1, which posts a cause or, for None, nothing."""
    rank = dist.get_rank()
    store = FailureStore(rank, 2)
    dist.barrier()  # both have imported everything
    if rank == 1:
        if cause is not None:
            store.post(cause)
        dist.barrier()
        return ""
    args = SimpleNamespace(process_index=0, world_size=2, output_dir=folder, ddp_timeout=60)
    trainer = SimpleNamespace(args=args, state=SimpleNamespace(global_step=4))
    text = _describe_lost_rank(trainer, RuntimeError(error), store)
    dist.barrier()
    return text


@pytest.mark.parametrize(
    ("cause", "error", "message"),
    [
        ("step 5, rank 1 of 2: no disk", "gloo: closed", "another rank has failed: step 5, rank 1 of 2: no disk"),
        (None, "gloo: Connection closed by peer", "rank 1 exited without an error message (killed? check the host's"),
        (None, "gloo: timed out", "rank 1 did not answer within ddp_timeout = 60 s. It hangs, or needs longer: raise"),
        ("", "gloo: closed", "another rank exited without an error message"),  # all are alive
    ],
    ids=["failed", "killed", "hangs", "failed silently"],
)
def test_other_ranks_name_the_rank_that_failed(cause: str | None, error: str, message: str, tmp_path: Path) -> None:
    text, _ = run_distributed(describe_lost_rank, 2, cause, error, str(tmp_path))
    assert text.startswith(f"step 5, rank 0 of 2: {message}")


def loss_is_not_finite(folder: str, changes: dict[str, Any]) -> Any:
    reset_accelerate()
    trainer = failing("not a number", folder, **changes)
    try:
        trainer.train()
    except TrainingFailure as error:
        finite = all(p.isfinite().all() for p in trainer.model.parameters())
        return str(error), trainer.state.global_step, finite
    finally:
        reset_accelerate()
    return "", trainer.state.global_step, None


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    results = run_distributed(loss_is_not_finite, 2, str(tmp_path), {})
    for rank, (message, step, finite) in enumerate(results):
        assert f"step 2, rank {rank} of 2: the loss is not finite, first on rank 1 in micro-batch 0" in message
        assert "lower learning_rate" in message and f"{tmp_path / 'checkpoint-1'} is complete" in message
        assert step == 1 and finite, "the parameters are those before the step"
    for message, step, _ in run_distributed(loss_is_not_finite, 2, str(tmp_path), {"logging_nan_inf_filter": True}):
        assert not message and step == STEPS


def restarted(kind: str, folder: str) -> None:
    trainer = failing(kind, folder)
    trainer.train(resume_from_checkpoint="latest")
    if trainer.args.process_index == 0:
        torch.save(outcome(trainer), f"{folder}/outcome")


@pytest.mark.slow
@cannot_resume
def test_torchrun_restarts_a_launch_whose_rank_was_killed_in_a_save(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = launch(restarted, 2, "killed in a save", str(out), folder=tmp_path / "log", restarts=1)
    assert ended.exit_code == 0, ended.errors[0][-2000:]
    assert "step 3, rank 0 of 2: rank 1 exited without an error message" in ended.errors[0], "of the first attempt"
    assert f"{out / 'checkpoint-2'} is not complete: its save did not finish" in ended.errors[0]
    assert_same_run(torch.load(out / "outcome", weights_only=False), tmp_path)


def test_the_store_may_have_ended_as_well(tmp_path: Path) -> None:
    """If torchrun does not hold the store, it ends with rank 0."""

    def ended() -> None:
        raise dist.DistNetworkError("Connection reset by peer")

    args = SimpleNamespace(process_index=1, world_size=2, output_dir=tmp_path, ddp_timeout=60)
    trainer = SimpleNamespace(args=args, state=SimpleNamespace(global_step=4))
    store: Any = SimpleNamespace(post=lambda: None, collect=ended)
    text = _describe_lost_rank(trainer, RuntimeError("gloo: Connection closed by peer"), store)
    assert text.startswith("step 5, rank 1 of 2: another rank has ended") and "own output says why" in text


def without_targets(folder: str, degree: int, average: bool, empty: list[int]) -> str:
    """Return the error of a run whose step has 4 rows, of which these have no target."""
    reset_accelerate()
    data = rows(False)
    for row in empty:
        data[row]["labels"][:] = -100
    keywords = arguments(folder, 2 // degree, sequence_parallel_size=degree, average_tokens_across_devices=average)
    trainer = SequentialTrainer(model=tiny_model(), args=LinearLlama3TrainingArguments(**keywords), train_dataset=data)
    try:
        trainer.train()
    except TrainingFailure as failure:
        return str(failure)
    finally:
        reset_accelerate()
    return "trained"


@pytest.mark.parametrize(
    ("degree", "average", "empty", "message"),
    [
        (2, True, [4, 5, 6, 7], "got none in this step's rows: all labels are -100"),
        (1, True, [4, 5, 6, 7], "got none in this step's rows: all labels are -100"),
        (1, False, [5, 7], "got none in this step's rows of rank 1: all labels are -100"),  # each divides by its count
        (1, True, [5, 7], "trained"),
    ],
)
def test_a_step_without_targets(degree: int, average: bool, empty: list[int], message: str, tmp_path: Path) -> None:
    for rank, said in enumerate(run_distributed(without_targets, 2, str(tmp_path), degree, average, empty)):
        assert message in said
        assert message == "trained" or said.startswith(f"step 2, rank {rank} of 2: the loss is a mean over targets")
        assert "learning_rate" not in said


@pytest.mark.parametrize(
    ("world", "degree", "rows_at_once", "checkpointing", "expected"),
    [
        (4, 2, 2, False, "Use per_device_train_batch_size=1 with gradient_accumulation_steps=6, or gradient_"),
        (4, 2, 1, True, "Use sequence_parallel_size=4 with gradient_accumulation_steps=6, 250 tokens a rank."),
        (4, 4, 1, True, "Use sequence_parallel_size=8 on 8 processes, 125 tokens a rank."),
        (6, 2, 1, False, "Use gradient_checkpointing=True, or sequence_parallel_size=3, 334 tokens a rank."),
    ],
)
def test_the_next_degree_to_try(world: int, degree: int, rows_at_once: int, checkpointing: bool, expected: str) -> None:
    args = SimpleNamespace(
        per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=3,
        gradient_checkpointing=checkpointing,
        world_size=world,
    )
    context = SimpleNamespace(world_size=degree)
    trainer = SimpleNamespace(args=args, sequence_parallel_context=context, batch_shape=(rows_at_once, 1000))
    assert expected in _less_memory(trainer)
