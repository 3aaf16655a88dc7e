"""Losses, gradients and trained parameters in any groups equal those of one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from linear_llama3.sequence_parallel import enable_sequence_parallel
from linear_llama3.sequence_parallel.planner import (
    Cluster,
    Group,
    MicroBatch,
    StepPlan,
)
from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments
from linear_llama3.trainer.adaptive.planned_steps import StepPlanner, group_contexts
from linear_llama3.trainer.data.packing import collate_documents
from tests.helpers.adaptive import LENGTHS, MODELS, flat_costs, one_row, profile_file, rows, tiny_model
from tests.helpers.ranks import run_distributed
from tests.helpers.training import arguments, outcome, reset_accelerate, shard_on_cpus

PLANS: dict[str, list[list[tuple[int, list[int]]]]] = {  # micro-batches of (degree, positions)
    "2+1+1": [[(2, [0, 3, 9]), (1, [1, 10, 6, 4]), (1, [2, 5, 7, 8, 11])]],
    "1+1+2, 4": [[(1, [1, 10]), (1, [2, 5]), (2, [0, 3])], [(4, [8, 4, 6, 7, 9, 11])]],
    "2+2, 1+1+1+1, 4": [[(2, [0]), (2, [1, 2, 10])], [(1, [3]), (1, [4, 9]), (1, [5, 6]), (1, [7])], [(4, [8, 11])]],
}


def hand_made(layout: list[list[tuple[int, list[int]]]]) -> StepPlan:
    batches = []
    for groups in layout:
        firsts = [sum(degree for degree, _ in groups[:n]) for n in range(len(groups))]
        made = [
            Group(degree=degree, first_rank=first, sequences=tuple(own), tokens=0, seconds=1.0)
            for first, (degree, own) in zip(firsts, groups, strict=True)
        ]
        batches.append(MicroBatch(groups=tuple(made)))
    return StepPlan(devices=4, micro_batches=tuple(batches))


def documents_inside(data: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same rows, of several documents each, whose labels are as they were."""
    return [{**row, "position_ids": torch.arange(len(row["labels"])) % 4} for row in data]


def run_plans(kind: str, inside: bool) -> dict[str, tuple[float, np.ndarray]]:
    """By plan, and with one degree for all: loss and gradients of all ranks together."""
    model, data = tiny_model(kind).double(), rows()
    data = documents_inside(data) if inside else data
    costs = flat_costs([1, 2, 4])
    options: dict[str, Any] = {"devices": 4, "timeout": 60.0, "device": torch.device("cpu")}
    contexts = group_contexts(model, costs, "auto", **options)
    assert len(contexts) == 3, "a rank is in log2(4) groups, and one of its own"
    cluster = Cluster(devices=4, memory=1e9)
    planner = StepPlanner(data, one_row, contexts, cluster=cluster, costs=costs, rank=dist.get_rank())
    portions, results = {}, {}
    for name, layout in PLANS.items():
        order = sorted(i for groups in layout for _, own in groups for i in own)
        assert order == list(range(len(data)))
        step = planner.materialize(hand_made(layout), order)
        tokens = torch.tensor(step["input_ids"].numel())
        dist.all_reduce(tokens)
        assert tokens == sum(LENGTHS)
        portions[name] = [(batch.group, batch.inputs) for batch in step.micro_batches]
        assert step.targets == sum(int((inputs["shift_labels"] != -100).sum()) for _, inputs in portions[name])
    portions["static"] = [((4, 0), contexts[4, 0].shard_batch(one_row([row]))) for row in data]
    for name, own in portions.items():
        count = torch.tensor(sum(int((inputs["shift_labels"] != -100).sum()) for _, inputs in own))
        dist.all_reduce(count)
        total = torch.zeros(())
        model.zero_grad()
        for group, inputs in own:
            enable_sequence_parallel(model, contexts[group])
            assert contexts[group].layout == ("zigzag" if kind == "hybrid" else "contiguous")
            loss = model(**inputs, num_items_in_batch=count, skip_logits=True).loss
            loss.backward()
            total = total + loss.detach()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        dist.all_reduce(total)
        dist.all_reduce(gradients)
        results[name] = total.item(), gradients.numpy()
    return results


@pytest.mark.parametrize(
    ("kind", "inside"),
    [
        ("hybrid", True),
        ("linear", False),
        pytest.param("hybrid", False, marks=pytest.mark.slow),
        pytest.param("gla", False, marks=pytest.mark.slow),
    ],
)
def test_any_plan_equals_one_process(kind: str, inside: bool) -> None:
    """float64, every row by itself through the plain model, and in the same way with one degree for all.

    `inside`: rows have documents inside, and none of the three puts out labels where these begin: a collator would.
    """
    model, data = tiny_model(kind).double(), rows()
    data = documents_inside(data) if inside else data
    count = sum(int((row["labels"][1:] != -100).sum()) for row in data)
    total = 0.0
    for row in data:
        loss = model(**one_row([row]), num_items_in_batch=count, skip_logits=True).loss
        loss.backward()
        total += loss.item()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).numpy()
    for results in run_distributed(run_plans, 4, kind, inside):
        assert results.keys() == {*PLANS, "static"}
        for name, (loss, gradients) in results.items():
            assert loss == pytest.approx(total, rel=1e-10), name
            assert abs(gradients - expected).max() < 1e-10, name


class FsdpTrainer(LinearLlama3Trainer):
    """FSDP2 over all ranks, as accelerate does on GPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard_on_cpus(self)


class StopAt(TrainerCallback):
    """Stops a run after a save, like a machine that is switched off."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def train(kind: str, folder: str, profile: str | None, checkpoint: str | None = None, **changes: Any) -> dict[str, Any]:
    """Train epochs of 20 shuffled rows in steps of 8, 8 and 4; without a profile on complete rows."""
    reset_accelerate()
    world = dist.get_world_size()
    stop, fsdp = changes.pop("stop", None), changes.pop("fsdp", False) and world > 1
    model: Any = tiny_model(kind)
    if changes.pop("lora", False):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(2)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    parallel: dict[str, Any] = {"sequence_parallel_size": 1}
    if profile is not None:
        parallel = {"sequence_parallel_size": "adaptive", "planner_profile": profile, "linear_strategy": "auto"}
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8 // world,
        "per_device_eval_batch_size": 8 // world,
        "gradient_accumulation_steps": 1,
        "max_steps": 5,
    }
    settings |= {"include_num_input_tokens_seen": "non_padding", "learning_rate": 0.3, **parallel, **changes}
    args = LinearLlama3TrainingArguments(**arguments(folder, 1, **settings))
    data: Any = rows(20)
    if kind == "gla":
        data = Dataset.from_list([{name: x.tolist() for name, x in row.items()} for row in data])
    trainer = (FsdpTrainer if fsdp else LinearLlama3Trainer)(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=rows(8),
        data_collator=functools.partial(collate_documents, padding=0),
        callbacks=[StopAt(stop)] if stop else [],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    result = {**outcome(trainer), "log": trainer.state.log_history}
    if not checkpoint and not stop:
        result["eval"] = trainer.evaluate()["eval_loss"]
    reset_accelerate()
    return result


def assert_equal(run: dict[str, Any], one: dict[str, Any], where: Any) -> None:
    for got, expected in zip(run["history"], one["history"], strict=True):
        assert got == pytest.approx(expected, rel=1e-4), where
    for name, expected in one["parameters"].items():
        assert abs(run["parameters"][name] - expected).max() < 1e-5, (where, name)
    assert run["tokens"] == one["tokens"], where


@pytest.mark.parametrize(
    ("kind", "worlds"),
    [
        pytest.param("gla", (4,), id="gla-W4"),
        *(pytest.param(kind, (4, 2, 1), id=kind, marks=pytest.mark.slow) for kind in MODELS),
    ],
)
def test_training_equals_one_process(kind: str, worlds: tuple[int, ...], tmp_path: Path) -> None:
    """The same order of the rows, losses, gradient norms, parameters, tokens; then an evaluation on complete rows."""
    (one,) = run_distributed(train, 1, kind, str(tmp_path / "one"), None)
    assert one["eval"] < one["history"][0][0] - 0.1, "nothing was learnt"
    for world in worlds:
        profile = profile_file(tmp_path, kind, world)
        for run in run_distributed(train, world, kind, str(tmp_path / "many"), profile):
            assert_equal(run, one, world)
            assert run["eval"] == pytest.approx(one["eval"], rel=1e-4)
            logs = [entry for entry in run["log"] if "loss" in entry]
            assert all(entry["predicted_step_seconds"] > 0 < entry["measured_step_seconds"] for entry in logs)
            degrees = {d for d in (1, 2, 4) if any(entry.get(f"groups_of_{d}") for entry in logs)}
            assert degrees == {d for d in (1, 2, 4) if d <= world}, "groups of all degrees were used"


@pytest.mark.skipif(
    transformers.__version__.startswith("5.17."), reason="transformers 5.17 cannot resume on several CPU processes"
)
@pytest.mark.parametrize(
    "resumed", [[(2, True)], pytest.param([(4, True), (1, False)], marks=pytest.mark.slow)], ids=["W2", "W4-static"]
)
def test_a_resume_continues_in_the_middle_of_an_epoch(resumed: list[tuple[int, bool]], tmp_path: Path) -> None:
    """On four ranks, on fewer, and with a static degree: the rows of a step stay the same."""
    (one,) = run_distributed(train, 1, "hybrid", str(tmp_path / "one"), None)
    saved = str(tmp_path / "saved")
    run_distributed(train_until, 4, saved, profile_file(tmp_path, "hybrid", 4), 2)
    checkpoint = f"{saved}/checkpoint-2"
    for world, adaptive in resumed:
        profile = profile_file(tmp_path, "hybrid", world) if adaptive else None
        for run in run_distributed(train, world, "hybrid", str(tmp_path / "on"), profile, checkpoint):
            assert_equal(run, one, (world, adaptive))


def train_until(folder: str, profile: str, step: int) -> None:
    train("hybrid", folder, profile, stop=step, save_strategy="steps", save_steps=step)


def train_with(folder: str, profile: str | None, changes: dict[str, Any]) -> dict[str, Any]:
    return train("hybrid", folder, profile, None, **changes)


@pytest.mark.parametrize(
    "changes",
    [{"lora": True, "gradient_checkpointing": True}, pytest.param({"fsdp": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_with_adapters_checkpointing_shards(changes: dict[str, Any], tmp_path: Path) -> None:
    (one,) = run_distributed(train_with, 1, str(tmp_path / "one"), None, changes)
    profile = profile_file(tmp_path, "hybrid", 4)
    for run in run_distributed(train_with, 4, str(tmp_path / "many"), profile, changes):
        assert_equal(run, one, changes)
