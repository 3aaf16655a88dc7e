"""Training on any grid of (data-parallel, sequence-parallel) processes is training on one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.sequence_parallel import LAYOUTS
from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments
from tests.helpers.ranks import run_distributed

LENGTH = 13  # no multiple of any number of ranks
GRIDS = [(1, 1), (2, 2), (2, 1), (4, 2), (4, 4)]  # (processes, sequence-parallel degree)


def tiny_config(**changes: Any) -> LinearLlama3Config:
    fields: dict[str, Any] = {
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "linear_attention_type": "gla",
        "gate_bias_init": 0.0,
        "full_attention_interval": 2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LinearLlama3Config(**{**fields, **changes})


def tiny_model() -> LinearLlama3ForCausalLM:
    torch.manual_seed(0)
    return LinearLlama3ForCausalLM(tiny_config())


def rows(packed: bool) -> list[dict[str, Tensor]]:
    """Eight rows with very uneven labels: the loss of a row's last part, or of all but it, does not count."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for i in range(8):
        ids = torch.randint(23, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: 12 if i % 3 == 0 else 0] = -100
        labels[5 if i % 3 == 1 else LENGTH :] = -100
        row = {"input_ids": ids, "labels": labels}
        if packed:
            row["position_ids"] = torch.cat([torch.arange(4 + i % 4), torch.arange(LENGTH - 4 - i % 4)])
        out.append(row)
    return out


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def arguments(folder: str, replicas: int, **changes: Any) -> dict[str, Any]:
    """Two optimizer steps of 4 rows each, whatever the number of data-parallel processes."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2 // replicas,
        "per_device_eval_batch_size": 2 // replicas,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **changes,
    }


def outcome(trainer: Trainer) -> dict[str, Any]:
    """(loss, gradient norm) per step, the parameters, the tokens."""
    parameters = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().numpy()  # FSDP2's are parts
        for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    }
    return {
        "history": [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log],
        "parameters": parameters,
        "tokens": trainer.state.num_input_tokens_seen,
        "flops": trainer.state.total_flos,
    }


def assert_same(run: dict[str, Any], one: dict[str, Any], where: Any) -> None:
    for got, expected in zip(run["history"], one["history"], strict=True):
        assert got == pytest.approx(expected, rel=2e-4), where
    for name, expected in one["parameters"].items():
        assert abs(run["parameters"][name] - expected).max() < 2e-5, (where, name)
    assert run["tokens"] == one["tokens"], where
    assert run["flops"] == pytest.approx(one["flops"], rel=1e-6), where


def train(world: int, degree: int, packed: bool, checkpointing: bool, folder: str, **choices: str) -> dict[str, Any]:
    """A run, its evaluation loss, and its logits."""
    reset_accelerate()
    changes = {"sequence_parallel_size": degree, "gradient_checkpointing": checkpointing, **choices}
    args = LinearLlama3TrainingArguments(**arguments(folder, world // degree, **changes))
    data = rows(packed)
    trainer = SequentialTrainer(model=tiny_model(), args=args, train_dataset=data, eval_dataset=data[:6])
    assert trainer.get_total_train_batch_size(args) == 4
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    prediction = trainer.predict(data[:6])
    unlabelled = trainer.predict([{name: x for name, x in row.items() if name != "labels"} for row in data[:6]])
    assert unlabelled.label_ids is None and "test_loss" not in unlabelled.metrics
    assert abs(unlabelled.predictions - prediction.predictions).max() < 1e-5, "labels change no logits"
    reset_accelerate()
    return {
        **outcome(trainer),
        "eval": evaluated,
        "logits": prediction.predictions,
        "labels": prediction.label_ids,
    }


class SequentialTrainer(LinearLlama3Trainer):
    """Rows in their order, so that every grid sees the same ones in a step."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train_with(linear: str, softmax: str, layout: str, folder: str) -> dict[str, Any]:
    return train(2, 2, True, False, folder, linear_strategy=linear, softmax_strategy=softmax, sequence_layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("linear", "softmax"),
    [("lasp1", "ring"), ("all_scan", "token_ring"), ("all_to_all", "rsa"), ("lasp2", "ulysses"), ("auto", "auto")],
)
def test_strategies_by_name(linear: str, softmax: str, layout: str, tmp_path: Path) -> None:
    (one,) = run_distributed(train, 1, 1, 1, True, False, str(tmp_path))
    for run in run_distributed(train_with, 2, linear, softmax, layout, str(tmp_path)):
        assert_same(run, one, (linear, softmax, layout))
        assert run["eval"] == pytest.approx(one["eval"], rel=1e-5)
        assert abs(run["logits"] - one["logits"]).max() < 1e-4


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_any_grid_equals_one_process(packed: bool, checkpointing: bool, tmp_path: Path) -> None:
    results = {
        grid: run_distributed(train, grid[0], *grid, packed, checkpointing, str(tmp_path))
        for grid in (GRIDS if not checkpointing else GRIDS[:2])
    }
    (one,) = results[1, 1]
    assert one["history"][0][0] != pytest.approx(one["history"][1][0], rel=1e-2), "nothing was learnt"
    assert one["tokens"] == 8 * LENGTH
    for grid, ranks in results.items():
        for run in ranks:
            assert_same(run, one, grid)
            assert run["eval"] == pytest.approx(one["eval"], rel=1e-4), grid
            assert run["logits"].shape == (6, LENGTH, 23) and (run["labels"] == one["labels"]).all(), grid
            assert abs(run["logits"] - one["logits"]).max() < 1e-4, grid


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from rows(False)


def train_as(kind: str, degree: int, folder: str) -> dict[str, Any]:
    """A run whose degree, data or arguments come in another way."""
    reset_accelerate()
    world = dist.get_world_size()
    changes: dict[str, Any] = {"include_num_input_tokens_seen": "all"}
    data: Any = rows(False)
    arguments_class: type[TrainingArguments] = TrainingArguments
    if kind == "environment":  # as accelerate launch --use_parallelism_config true --parallelism_config_cp_size
        os.environ |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": str(degree)}
    elif kind == "config":
        changes["parallelism_config"] = ParallelismConfig(cp_size=degree, dp_shard_size=world // degree)
    else:
        arguments_class = LinearLlama3TrainingArguments
        changes["sequence_parallel_size"] = degree
        if kind == "stream":
            data = Stream()
        elif kind == "local count":
            changes["average_tokens_across_devices"] = False
    try:
        args = arguments_class(**arguments(folder, world // degree, **changes))
        trainer = SequentialTrainer(model=tiny_model(), args=args, train_dataset=data)
        trainer.train()
        assert (trainer.sequence_parallel_context is None) == (degree == 1)
        return outcome(trainer)
    finally:
        for name in ("ACCELERATE_USE_PARALLELISM_CONFIG", "PARALLELISM_CONFIG_CP_SIZE"):
            os.environ.pop(name, None)
        reset_accelerate()


@pytest.mark.parametrize("kind", ["environment", "config", "stream"])
def test_other_ways_to_the_same_run(kind: str, tmp_path: Path) -> None:
    (one,) = run_distributed(train, 1, 1, 1, False, False, str(tmp_path))
    for world in (2, 4):
        for run in run_distributed(train_as, world, kind, 2, str(tmp_path)):
            assert_same(run, one, (kind, world))


def train_after_evaluation(degree: int, folder: str) -> dict[str, Any]:
    reset_accelerate()
    args = LinearLlama3TrainingArguments(
        **arguments(folder, dist.get_world_size() // degree, sequence_parallel_size=degree)
    )
    data = rows(False)
    trainer = SequentialTrainer(model=tiny_model(), args=args, train_dataset=data, eval_dataset=data[:6])
    trainer.evaluate()
    trainer.train()
    reset_accelerate()
    return outcome(trainer)


@pytest.mark.parametrize("degree", [1, 2])
def test_an_evaluation_before_training_changes_nothing(degree: int, tmp_path: Path) -> None:
    """transformers 5.23 then trains without DDP: each process on its own gradient."""
    (one,) = run_distributed(train, 1, 1, 1, False, False, str(tmp_path))
    for run in run_distributed(train_after_evaluation, 2, degree, str(tmp_path)):
        assert_same(run, one, degree)


def test_without_a_global_count_the_degree_changes_nothing(tmp_path: Path) -> None:
    """Then the loss is a mean of the data-parallel processes' means, with a warning."""
    one, _ = run_distributed(train_as, 2, "local count", 1, str(tmp_path))
    for run in run_distributed(train_as, 4, "local count", 2, str(tmp_path)):
        assert_same(run, one, "local count")
