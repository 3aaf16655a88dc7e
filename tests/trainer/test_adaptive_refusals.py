"""Refusals of adaptive groups: by name, at the start if possible, and on all ranks at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from torch import Tensor

from linear_llama3 import LinearLlama3Config, LinearLlama3ForMaskedLM
from linear_llama3.sequence_parallel.planner import Cluster, Costs, StepPlan, plan_one_degree
from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments
from linear_llama3.trainer.adaptive import planned_steps
from linear_llama3.trainer.adaptive.groups import AdaptiveGroups
from tests.helpers.adaptive import flat_costs, one_row, profile_file, rows, tiny_model
from tests.helpers.ranks import run_distributed
from tests.helpers.training import arguments, reset_accelerate

Rows = list[dict[str, Tensor]]


class Unreadable(list):
    """Rows that rank 1 cannot read again, once their lengths are known."""

    def __init__(self, data: Rows) -> None:
        super().__init__(data)
        self.reads = 0

    def __getitem__(self, row: Any) -> Any:
        self.reads += 1
        if dist.get_rank() == 1 and self.reads > len(self):
            raise OSError("the disk is gone")
        return super().__getitem__(row)


def with_rows(data: Rows, change: Callable[[Tensor], Tensor], *numbers: int) -> Rows:
    return [{name: change(x) for name, x in row.items()} if n in numbers else row for n, row in enumerate(data)]


def with_tokens_of_rank(data: Rows) -> Rows:
    return [{**row, "input_ids": row["input_ids"] + dist.get_rank() % 2} for row in data]


def with_masks(data: Rows) -> Rows:
    return [{**row, "attention_mask": (torch.arange(len(row["labels"])) < 3).long()} for row in data]


DATA: dict[str, Callable[[Rows], Any]] = {
    "all": lambda data: data,
    "13": lambda data: data[:13],
    "from the rank on": lambda data: data[dist.get_rank() :],
    "tokens of the rank": with_tokens_of_rank,
    "labels of the rank": lambda data: [{**data[0], "labels": data[0]["labels"][dist.get_rank() :]}] * 20,
    "of one length": lambda data: [{name: x.repeat(4)[:4] for name, x in row.items()} for row in data],
    "stream": iter,
    "masks": with_masks,
    "empty": lambda data: with_rows(data, lambda x: x[:0], 3, 7),
    "long": lambda data: with_rows(data, lambda x: x.repeat(40), *range(4, 20)),
    "unreadable": Unreadable,
}


def plan_of_rank(lengths: list[int], cluster: Cluster, costs: Costs) -> StepPlan | None:
    return plan_one_degree(lengths, cluster, costs, degree=1 << dist.get_rank())


def refused(folder: str, profiles: str | list[str] | None, changes: dict[str, Any]) -> str:
    """Args: profiles: of all ranks, or one of each."""
    reset_accelerate()
    changes = dict(changes)
    data = DATA[changes.pop("data", "all")](rows(20))
    model: Any = tiny_model("hybrid")
    if changes.pop("kind", "") == "masked":
        config = {**tiny_model("linear").config.to_dict(), "is_causal": False}
        model = LinearLlama3ForMaskedLM(LinearLlama3Config.from_dict(config))
    keywords = {name: changes.pop(name) for name in ("compute_loss_func",) if name in changes}
    if changes.pop("seed of the rank", False):
        changes["data_seed"] = dist.get_rank()
    planner = plan_of_rank if changes.pop("plans of the rank", False) else planned_steps.plan
    profile = profiles[dist.get_rank()] if isinstance(profiles, list) else profiles
    settings = {"sequence_parallel_size": "adaptive", "planner_profile": profile, "max_steps": 3, "ddp_timeout": 20}
    settings |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2, **changes}
    try:
        with patch.object(planned_steps, "plan", planner):
            LinearLlama3Trainer(
                model=model,
                args=LinearLlama3TrainingArguments(**arguments(folder, 1, **settings)),
                train_dataset=data,
                data_collator=one_row,
                **keywords,
            ).train()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        reset_accelerate()
    return ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"planner_profile": None}, "need planner_profile"),
        ({"planner_profile": "mine"}, "a profile must be one of"),
        ({"planner_profile": "llama-3.1-8b-h100"}, "a profile must be of the model"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, "replace a static degree, got both"),
        ({"compute_loss_func": one_row}, "accept no compute_loss_func"),
        ({"kind": "masked"}, "train causal language models, got a LinearLlama3ForMaskedLM"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        ({"dataloader_num_workers": 1}, "dataloader_num_workers must be 0"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices must be True"),
        ({"accelerator_config": {"split_batches": True}}, "leave dispatch_batches and split_batches out"),
        ({"linear_strategy": "mail"}, "a strategy for linear layers must be one of"),
        ({"data": "stream"}, "planned from the lengths of stored rows, got a stream"),
        ({"data": "masks"}, "with zeros in its attention_mask"),
        (
            {"data": "from the rank on"},
            "must make the same plan, got different ones of step 1 on rank 1 than on",
        ),
        ({"data": "tokens of the rank"}, "all ranks of a sequence must load the same batch"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    profile = profile_file(tmp_path, "hybrid", 2)
    texts = run_distributed(refused, 2, str(tmp_path), profile, changes)
    assert all(text.startswith("ValueError: ") and message in text for text in texts), texts


def test_other_rows_in_the_same_plan(tmp_path: Path) -> None:
    """In groups of one nobody else would notice."""
    changes = {"data": "of one length", "seed of the rank": True}
    texts = run_distributed(refused, 2, str(tmp_path), profile_file(tmp_path, "hybrid", 2), changes)
    assert all("must make the same plan, got different ones of step 1 on rank 1" in text for text in texts), texts


def test_other_plans_of_the_same_rows(tmp_path: Path) -> None:
    """Rank 0 plans groups of one, rank 1 groups of two."""
    profile = edited(profile_file(tmp_path, "hybrid", 2), bytes={"device": 1e7})
    texts = run_distributed(refused, 2, str(tmp_path), profile, {"plans of the rank": True})
    assert all("must make the same plan, got different ones of step 1 on rank 1" in text for text in texts), texts


def edited(path: str, **changes: Any) -> str:
    """Another file with other values; those of a table in place of its own, None for keys that go."""
    data = json.loads(Path(path).read_text())
    for name, value in changes.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) else value
        if isinstance(value, dict):
            data[name] = {key: entry for key, entry in data[name].items() if entry is not None}
    other = Path(path).with_name(f"other-{Path(path).name}")
    other.write_text(json.dumps(data))
    return str(other)


@pytest.mark.parametrize(
    ("world", "changes", "message"),
    [
        (4, {"links": {"4": None}}, "links of all groups that 4 processes can form, got none of 4 in"),
        (4, {"links": {"2": None, "4": None}}, "links of all groups that 4 processes can form, got none of 2 and 4 in"),
        (4, {"origin": "measured", "processes": 2}, "the launch's number of processes, 4, got one of 2 in"),
        (2, {"origin": "measured", "processes": 4}, "the launch's number of processes, 2, got one of 4 in"),
        (2, {"origin": "measured", "processes": 2}, ""),
        (
            2,
            {"gradient_checkpointing": True},
            "gradient_checkpointing=False, as the run has it, got True in",
        ),
        (2, {"gradient_checkpointing": False}, ""),
        (2, {"bytes": {"sharded": True}}, "whose states are sharded is of training with FSDP, got it in"),
    ],
    ids=str,
)
def test_profiles_of_other_launches(world: int, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    profile = edited(profile_file(tmp_path, "hybrid", world), **changes)
    texts = run_distributed(refused, world, str(tmp_path), profile, {})
    remedy = f"linear-llama3 profile RECIPE.yaml FILE.json processes={world}" if message else ""
    assert all(message in text and remedy in text and bool(text) == bool(message) for text in texts), texts


@pytest.mark.parametrize("fails", [False, True], ids=["differs", "is not there"])
def test_profiles_of_other_ranks(fails: bool, tmp_path: Path) -> None:
    """The last of four ranks has a profile by which it would make other groups, or no profile."""
    profile = profile_file(tmp_path, "hybrid", 4)
    other = str(tmp_path / "nowhere.json") if fails else edited(profile, seconds={"token": 2e-3})
    texts = run_distributed(refused, 4, str(tmp_path), [profile] * 3 + [other], {})
    expected = ["ValueError: all ranks must plan by the same costs, got different ones on rank 3 than on rank 0"] * 4
    if fails:
        known = "a profile must be one of"
        expected = [f"ValueError: rank 3 has failed: {known}"] * 3 + [f"ValueError: {known}"]
    assert all(text.startswith(start) for text, start in zip(texts, expected, strict=True)), texts


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ("unreadable", "TrainingFailure", "step 1, rank 1 of 2: the data could not be read: OSError: the disk is gone"),
        ("labels of the rank", "ValueError", "adaptive groups pack rows of input_ids, labels"),
    ],
)
def test_a_rank_that_cannot_read_stops_all(data: str, kind: str, message: str, tmp_path: Path) -> None:
    profile = profile_file(tmp_path, "hybrid", 2)
    first, second = run_distributed(refused, 2, str(tmp_path), profile, {"data": data})
    assert first.startswith(f"{kind}: rank 1 has failed: {message}")
    assert second.startswith(f"{kind}: {message}")


def test_rows_that_no_group_holds(tmp_path: Path) -> None:
    """Known before the first step, which draws others."""
    profile = profile_file(tmp_path, "hybrid", 4)
    for data, number, named in (
        ("empty", 2, "row 3 of 0 tokens, row 7 of 0 tokens;"),
        ("long", 16, "row 4 of 240 tokens, row 5 of 200 tokens, row 6 of 120 tokens, row 7 of 80 tokens, row 8 of 520"),
    ):
        for text in run_distributed(refused, 4, str(tmp_path), profile, {"data": data}):
            assert "must have 1 to 32 tokens (the largest group of 4 devices with 24.41 KiB each holds no more)" in text
            assert f"got {number} of 20 rows" in text
            assert named in text and ("..." in text) == (number > 8) and "GiB" not in text


def test_the_last_step_needs_a_row_for_every_group(tmp_path: Path) -> None:
    """Three processes are a group of two and one of one; 13 rows leave one for the second step."""
    profile, changes = profile_file(tmp_path, "hybrid", 1), {"data": "13", "per_device_train_batch_size": 4}
    assert all("needs at least 2 rows" in text for text in run_distributed(refused, 3, str(tmp_path), profile, changes))
    changes["dataloader_drop_last"] = True
    assert run_distributed(refused, 3, str(tmp_path), profile, changes) == [""] * 3


@pytest.mark.parametrize(("degrees", "left", "needed"), [([1, 2, 4], 1, 2), ([1, 2], 3, 4), ([1, 2, 4, 8], 1, 1)])
def test_the_last_step_by_the_degrees_that_there_are(degrees: list[int], left: int, needed: int) -> None:
    """Ulysses cannot divide four heads over eight ranks, so groups have up to four."""
    args = SimpleNamespace(world_size=8, dataloader_drop_last=False)
    groups: Any = SimpleNamespace(costs=flat_costs(degrees), trainer=SimpleNamespace(args=args))
    AdaptiveGroups._check_last_step(groups, 16 + needed, 16)
    with pytest.raises(ValueError, match=f"at least {needed} rows .* got {left}") if left < needed else nullcontext():
        AdaptiveGroups._check_last_step(groups, 16 + left, 16)
