"""Every row counts once, although several ranks hold it: `gather_for_metrics`, learning rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from linear_llama3.trainer import SequenceParallelAccelerator
from tests.helpers.ranks import run_distributed
from tests.helpers.training import GRIDS, reset_accelerate


def numbers(stop: float) -> Any:
    return torch.arange(stop)


def gathered(degree: int, rows: int, batch_size: int) -> list[Any]:
    """Gather an epoch of rows 0, 1, ... in every possible form."""
    reset_accelerate()
    accelerator = SequenceParallelAccelerator(cpu=True, sequence_parallel_size=degree)
    loader = accelerator.prepare(DataLoader(numbers(rows), batch_size=batch_size))
    seen: list[list[Any]] = [[], [], [], [], []]
    for x in loader:
        nested = accelerator.gather_for_metrics({"a": [x, (x[:, None] * torch.tensor([1.0, torch.nan]),)]})
        seen[0] += nested["a"][0].tolist()
        seen[1] += nested["a"][1][0][:, 0].tolist()
        seen[2] += accelerator.gather_for_metrics([f"row {i}" for i in x.tolist()])
        seen[3] += [i.item() for i in accelerator.gather_for_metrics(list(x), use_gather_object=True)]
        seen[4].append(accelerator.gather_for_metrics(torch.tensor(1)).sum().item())
    reset_accelerate()
    return seen


@pytest.mark.parametrize(("world", "degree"), GRIDS)
def test_every_row_once(world: int, degree: int) -> None:
    """Also with an incomplete last batch, and one that accelerate fills with rows of the first."""
    for rows in (7, 8, 5):
        for integers, floats, strings, objects, ones in run_distributed(gathered, world, degree, rows, 2):
            assert integers == floats == objects == list(range(rows)), (rows, integers)
            assert strings == [f"row {i}" for i in range(rows)]
            if degree > 1:
                assert set(ones) == {world}, "a number of every process"


def different_rows() -> str:
    reset_accelerate()
    accelerator = SequenceParallelAccelerator(cpu=True, sequence_parallel_size=2)
    try:
        accelerator.gather_for_metrics(torch.full((3, 2), float(accelerator.process_index)))
    except ValueError as error:
        return str(error)
    finally:
        reset_accelerate()
    return ""


def test_parts_of_sequences_are_refused() -> None:
    for message in run_distributed(different_rows, 2):
        assert "takes rows that all ranks of a sequence agree on, got different ones" in message


def learning_rates(degree: int, accumulate: int, kind: str) -> list[float]:
    """Return the learning rates of every batch of an epoch, by a schedule over the batches of one process."""
    reset_accelerate()
    accelerator = SequenceParallelAccelerator(
        cpu=True, sequence_parallel_size=degree, gradient_accumulation_steps=accumulate
    )
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer: Any = torch.optim.SGD([weight], lr=1.0)
    schedules = {
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=8),
        "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=8),
    }
    loader = DataLoader(numbers(16.0), batch_size=2)
    optimizer, loader, scheduler = accelerator.prepare(optimizer, loader, schedules[kind]())
    rates = []
    for x in loader:
        with accelerator.accumulate():
            accelerator.backward((weight * x).sum())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        rates.append(scheduler.get_last_lr()[0])
    reset_accelerate()
    return rates


@pytest.mark.parametrize("kind", ["linear", "one cycle"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_schedule_advances_with_the_batches(accumulate: int, kind: str) -> None:
    """Learning rates equal those of one process per replica, without sequence parallelism."""
    for world, degree in ((2, 2), (4, 2)):
        replicas = world // degree
        expected = run_distributed(learning_rates, replicas, 1, accumulate, kind)[0]
        assert len(set(expected)) > 1
        for rates in run_distributed(learning_rates, world, degree, accumulate, kind):
            assert rates == expected, (world, degree)
