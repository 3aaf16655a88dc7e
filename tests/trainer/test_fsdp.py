"""FSDP2 (fully_shard) with sequence parallelism over gloo: what accelerate does on GPUs, for it ignores FSDP on CPUs.

Mixed precision, offload and NCCL are not run here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import transformers
from accelerate.parallelism_config import ParallelismConfig
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Replicate, Shard

from linear_llama3.trainer import LinearLlama3TrainingArguments
from linear_llama3.trainer.__main__ import save
from tests.helpers.ranks import run_distributed
from tests.helpers.training import (
    SequentialTrainer,
    arguments,
    outcome,
    reset_accelerate,
    rows,
    shard_on_cpus,
    tiny_model,
)

STEPS, STOP = 4, 3  # a step is half an epoch


class FsdpTrainer(SequentialTrainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard_on_cpus(self)


def train(
    degree: int, folder: str, checkpoint: str | None = None, replicas: int = 1, checkpointing: bool = False
) -> dict[str, Any]:
    """Under FSDP2 if there are several processes, HSDP if several `replicas`; with a save, unless from a checkpoint."""
    reset_accelerate()
    world = dist.get_world_size()
    rows_at_once = world // degree  # of the 4 of a step
    keywords = arguments(folder, min(rows_at_once, 2), optim="adamw_torch", adam_epsilon=1e-3, learning_rate=0.01)
    keywords |= {"gradient_accumulation_steps": 1 if rows_at_once == 4 else 2}
    keywords |= {"max_steps": STEPS, "gradient_checkpointing": checkpointing}
    keywords |= {"save_strategy": "steps", "save_steps": STOP} if checkpoint is None else {}
    if world > 1:
        keywords["parallelism_config"] = ParallelismConfig(
            cp_size=degree, dp_shard_size=rows_at_once // replicas, dp_replicate_size=replicas
        )
    trainer = (FsdpTrainer if world > 1 else SequentialTrainer)(
        model=tiny_model(), args=LinearLlama3TrainingArguments(**keywords), train_dataset=rows(True)
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    result = outcome(trainer)
    placements = {p.placements if isinstance(p, DTensor) else None for p in trainer.model.parameters()}
    save(trainer)
    reset_accelerate()
    return {**result, "placements": placements}


def assert_equal(run: dict[str, Any], one: dict[str, Any], where: Any) -> None:
    for got, expected in zip(run["history"], one["history"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5), where
    for name, expected in one["parameters"].items():
        assert abs(run["parameters"][name] - expected).max() < 1e-5, (where, name)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_distributed(train, 1, 1, str(tmp_path_factory.mktemp("one")))[0]


@pytest.mark.skipif(
    transformers.__version__.startswith("5.17."), reason="transformers 5.17 cannot resume on several CPU processes"
)
@pytest.mark.parametrize(
    ("grids", "resumes"),
    [
        pytest.param([(2, 2, False)], [("2-2", 4, 4)], id="W2"),
        pytest.param([(2, 2, False), (4, 2, True)], [("4-2", 2, 2), ("2-2", 4, 4)], id="W2-W4", marks=pytest.mark.slow),
    ],
)
def test_shards_of_the_model_and_of_sequences(
    grids: list[tuple[int, int, bool]], resumes: list[tuple[str, int, int]], one: dict[str, Any], tmp_path: Path
) -> None:
    """Runs, their distributed checkpoints at other degrees, and the complete weights at the end."""
    for world, degree, checkpointing in grids:
        folder = tmp_path / f"{world}-{degree}"
        for run in run_distributed(train, world, degree, str(folder), None, 1, checkpointing):
            assert_equal(run, one, (world, degree))
            assert run["placements"] == {(Shard(0),)}, "over data-parallel and sequence-parallel ranks together"
        assert len(list(folder.glob(f"checkpoint-{STOP}/pytorch_model_fsdp_0/*.distcp"))) == world
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == one["parameters"].keys()
        assert all(abs(weights[name].numpy() - p).max() < 1e-5 for name, p in one["parameters"].items())
    for before, world, degree in resumes:
        checkpoint = str(tmp_path / before / f"checkpoint-{STOP}")
        for run in run_distributed(train, world, degree, str(tmp_path / "on"), checkpoint):
            assert_equal(run, one, (before, world, degree))


@pytest.mark.slow
def test_replicas_of_shards(one: dict[str, Any], tmp_path: Path) -> None:
    """HSDP: 2 replicas x 2 shards x 2 ranks of a sequence."""
    for run in run_distributed(train, 8, 2, str(tmp_path), None, 2):
        assert_equal(run, one, "HSDP")
        assert run["placements"] == {(Replicate(), Shard(0))}
