"""Training on any grid of (data-parallel, sequence-parallel) processes is training on one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.sequence_parallel import LAYOUTS, SequenceParallelConfig
from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments, SequenceParallelAccelerator
from linear_llama3.trainer.parallelism import attach, resolve_parallelism
from tests.distributed import run_distributed

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


def own_loop(degree: int, accumulate: int) -> tuple[list[float], Tensor]:
    """The loop of SequenceParallelAccelerator's docstring: loss per step of 2 * `accumulate` rows, parameters."""
    reset_accelerate()
    accelerator = SequenceParallelAccelerator(
        cpu=True, sequence_parallel_size=degree, gradient_accumulation_steps=accumulate
    )
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    replicas = accelerator.num_processes // degree
    loader = torch.utils.data.DataLoader(rows(False), batch_size=2 // replicas)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, batches = [], list(loader)
    for i in range(0, len(batches), accumulate):
        step = batches[i : i + accumulate]
        count = accelerator.num_items(*step)
        losses.append(0.0)
        for batch in step:
            with accelerator.accumulate(model):
                loss = model(**accelerator.shard_batch(batch), num_items_in_batch=count).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses[-1] += accelerator.reduce(loss.detach(), "mean").item() / accumulate
    parameters = nn.utils.parameters_to_vector(accelerator.unwrap_model(model).parameters()).detach()
    reset_accelerate()
    return losses, parameters.numpy()


def plain_loop(rows_in_a_step: int) -> tuple[list[float], Tensor]:
    """What `own_loop` has to equal: one model, whole rows, the loss that transformers computes from labels."""
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for batch in torch.utils.data.DataLoader(rows(False), batch_size=rows_in_a_step):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_own_loop_equals_a_plain_one(accumulate: int) -> None:
    losses, parameters = plain_loop(2 * accumulate)
    for world, degree in ((1, 1), (2, 2), (4, 2), (2, 1)):
        for got_losses, got_parameters in run_distributed(own_loop, world, degree, accumulate):
            assert got_losses == pytest.approx(losses, rel=1e-4), (world, degree)
            assert abs(got_parameters - parameters).max() < 1e-4, (world, degree)


def degree_of(setting: str, size: int | str) -> int | str:
    """The degree that a launch of 4 processes gets, or the error."""
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


def test_engines_that_are_refused() -> None:
    accelerator = SimpleNamespace(state=SimpleNamespace(distributed_type=DistributedType.DEEPSPEED))
    with pytest.raises(ValueError, match="goes with DDP and FSDP2, got DEEPSPEED"):
        attach(accelerator, ParallelismConfig(cp_size=2), SequenceParallelConfig())
