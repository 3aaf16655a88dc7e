"""Documents, models and cost profiles for tests of adaptive groups."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.sequence_parallel.costs import LinkSpeed
from linear_llama3.sequence_parallel.planner import (
    Costs,
    DegreeCosts,
    Profile,
)
from linear_llama3.sequence_parallel.planner.profile import Bytes, Seconds
from linear_llama3.trainer.adaptive.groups import planner_model
from tests.helpers.training import tiny_config

LENGTHS = [29, 17, 11, 7, 6, 5, 3, 2, 13, 4, 1, 8]  # of 12 rows
MODELS = {"hybrid": ("gla", 2), "gla": ("gla", None), "linear": ("basic", None)}
STRATEGIES = {2: ("lasp1", "ring"), 4: ("all_scan", "lasp2h")}


def tiny_model(kind: str) -> LinearLlama3ForCausalLM:
    torch.manual_seed(0)
    mixer, interval = MODELS[kind]
    return LinearLlama3ForCausalLM(tiny_config(linear_attention_type=mixer, full_attention_interval=interval))


def rows(count: int = len(LENGTHS)) -> list[dict[str, Tensor]]:
    """Documents with very uneven labels."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for i, length in enumerate((LENGTHS * 2)[:count]):
        ids = torch.randint(23, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 2 if i % 3 == 0 else 0] = -100
        out.append({"input_ids": ids, "labels": labels})
    return out


def one_row(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: x[None] for name, x in batch[0].items()}


def flat_costs(degrees: list[int]) -> Costs:
    def costs(degree: int) -> DegreeCosts:
        linear, softmax = STRATEGIES.get(degree, ("", ""))
        return DegreeCosts(
            fixed=1.0, per_token=1 / degree, per_square=0.0, fixed_bytes=0, bytes_per_token=1, linear=linear,
            softmax=softmax,
        )  # fmt: skip

    return Costs(by_degree={degree: costs(degree) for degree in degrees})


def profile_file(folder: Path, kind: str, devices: int) -> str:
    """By which the longest row needs all devices, and a step several micro-batches."""
    profile = Profile(
        name="test",
        origin="simulated",
        source="made up",
        hardware="none",
        gradient_checkpointing=None,
        model=planner_model(tiny_model(kind).config, 4),
        seconds=Seconds(micro_batch=0.01, token=1e-3, softmax_square=0.0),
        bytes=Bytes(device=1e5 / devices, states=1e3, sharded=False, token=2e3),
        links={2: LinkSpeed(1e-4, 1e9), 4: LinkSpeed(2e-4, 1e9)},
    )
    path = folder / f"profile-{devices}.json"
    profile.save(path)
    return str(path)
