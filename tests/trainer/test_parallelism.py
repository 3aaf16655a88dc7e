"""The degree that a launch gets, and what sequence parallelism refuses."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from torch import Tensor

from linear_llama3.trainer import LinearLlama3TrainingArguments
from linear_llama3.trainer.parallelism import install_cp_mesh, resolve_parallelism
from tests.helpers.ranks import run_distributed
from tests.helpers.training import SequentialTrainer, reset_accelerate, rows, tiny_model


def degree_of(setting: str, size: int | str) -> int | str:
    """Return the degree that a launch of 4 processes gets, or the error."""
    given = None
    if setting.startswith("env"):
        os.environ["PARALLELISM_CONFIG_CP_SIZE"] = setting[3:]
    elif setting:
        given = ParallelismConfig(cp_size=int(setting))
    try:
        grid = resolve_parallelism(given, size, dist.get_world_size())
        return 1 if grid is None else grid.cp_size
    except ValueError as error:
        return str(error)
    finally:
        os.environ.pop("PARALLELISM_CONFIG_CP_SIZE", None)


@pytest.mark.parametrize(
    ("setting", "size", "expected"),
    [
        ("", "auto", 4),
        ("", 2, 2),
        ("", 1, 1),
        ("env2", "auto", 2),
        ("env1", "auto", 1),
        ("2", 4, 2),
        ("", 3, "must divide the number of processes, got 3 for 4"),
        ("env3", "auto", "must divide the number of processes, got 3 for 4"),
        ("", "all", "must be 'auto' or a positive integer, got 'all'"),
        ("", 0, "must be 'auto' or a positive integer, got 0"),
    ],
)
def test_degree(setting: str, size: int | str, expected: int | str) -> None:
    for got in run_distributed(degree_of, 4, setting, size):
        assert got == expected or (isinstance(expected, str) and isinstance(got, str) and expected in got)


def refused(changes: dict[str, Any], folder: str) -> str:
    reset_accelerate()
    data = changes.pop("data", None) or rows(False)
    if changes.pop("other_rows", False):
        data = data[dist.get_rank() :]
    keywords = {"compute_loss_func": changes.pop("compute_loss_func")} if "compute_loss_func" in changes else {}
    args = LinearLlama3TrainingArguments(
        output_dir=folder, use_cpu=True, max_steps=1, report_to=[], disable_tqdm=True, save_strategy="no", **changes
    )
    try:
        SequentialTrainer(model=tiny_model(), args=args, train_dataset=data, **keywords).train()
    except ValueError as error:
        return str(error)
    finally:
        reset_accelerate()
    return ""


def some_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    return outputs.logits.sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches must be False"),
        ({"compute_loss_func": some_loss}, "compute_loss_func is not possible"),
        ({"linear_strategy": "mail"}, "got 'mail'"),
        ({"other_rows": True}, "must load the same batch"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert all(message in text for text in run_distributed(refused, 2, changes, str(tmp_path)))


def other_rows_in_a_second_run(folder: str) -> str:
    reset_accelerate()
    args = LinearLlama3TrainingArguments(
        output_dir=folder, use_cpu=True, max_steps=2, report_to=[], disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=1,
    )  # fmt: skip
    trainer = SequentialTrainer(model=tiny_model(), args=args, train_dataset=rows(False))
    trainer.train()
    args.max_steps, trainer.train_dataset = 1, rows(False)[dist.get_rank() :]
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    finally:
        reset_accelerate()
    return ""


def test_a_trainer_that_trains_again_compares_its_first_batch(tmp_path: Path) -> None:
    """Its third batch in all; batches 1, 2, 4 and so on of a run are compared."""
    assert all(
        "must load the same batch" in text for text in run_distributed(other_rows_in_a_second_run, 2, str(tmp_path))
    )


def test_engines_that_are_refused() -> None:
    accelerator = SimpleNamespace(state=SimpleNamespace(distributed_type=DistributedType.DEEPSPEED))
    with pytest.raises(ValueError, match="works with DDP and FSDP2, got DEEPSPEED"):
        install_cp_mesh(accelerator, ParallelismConfig(cp_size=2))
