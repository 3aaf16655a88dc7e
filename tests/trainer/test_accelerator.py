"""A custom loop with SequenceParallelAccelerator equals a plain loop on one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from linear_llama3.trainer import SequenceParallelAccelerator
from tests.helpers.ranks import run_distributed
from tests.helpers.training import reset_accelerate, rows, tiny_model


def own_loop(degree: int, accumulate: int) -> tuple[list[float], np.ndarray]:
    """Return the losses of steps of 2 * `accumulate` rows, and the parameters, of the documented custom loop."""
    reset_accelerate()
    accelerator = SequenceParallelAccelerator(
        cpu=True, sequence_parallel_size=degree, gradient_accumulation_steps=accumulate
    )
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    replicas = accelerator.num_processes // degree
    data: Any = rows(False)
    loader = torch.utils.data.DataLoader(data, batch_size=2 // replicas)
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


def plain_loop(rows_in_a_step: int) -> tuple[list[float], np.ndarray]:
    """Train one model on complete rows with the loss that transformers computes from labels."""
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    data: Any = rows(False)
    for batch in torch.utils.data.DataLoader(data, batch_size=rows_in_a_step):
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
