"""The LASP-2 paper's bidirectional experiment in small (a masked language model, linear attention without a mask):
trained on any grid of processes it has the losses of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_llama3 import LinearLlama3Config, LinearLlama3ForMaskedLM
from linear_llama3.trainer import LinearLlama3TrainingArguments, SequenceParallelAccelerator
from tests.helpers.ranks import run_distributed
from tests.helpers.training import GRIDS, SequentialTrainer, arguments, assert_same, outcome, reset_accelerate

LENGTH, VOCAB, MASK = 13, 23, 22


def masked_model() -> LinearLlama3ForMaskedLM:
    torch.manual_seed(0)
    config = LinearLlama3Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, linear_attention_type="basic", full_attention_interval=0, is_causal=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LinearLlama3ForMaskedLM(config)


def masked_rows(padded: bool) -> list[dict[str, Tensor]]:
    """Eight rows that count upwards, some of their tokens masked."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for i in range(8):
        ids = (torch.arange(LENGTH) + torch.randint(VOCAB, (), generator=generator)) % (VOCAB - 1)
        hidden = torch.rand(LENGTH, generator=generator) < 0.3
        hidden[i % 4] = True
        row = {"input_ids": ids.masked_fill(hidden, MASK), "labels": ids.masked_fill(~hidden, -100)}
        if padded:
            row["attention_mask"] = (torch.arange(LENGTH) < LENGTH - i).long()
            row["labels"][LENGTH - i :] = -100
        out.append(row)
    return out


def train(world: int, degree: int, padded: bool, folder: str) -> dict[str, Any]:
    reset_accelerate()
    args = LinearLlama3TrainingArguments(**arguments(folder, world // degree, sequence_parallel_size=degree))
    data = masked_rows(padded)
    trainer = SequentialTrainer(model=masked_model(), args=args, train_dataset=data, eval_dataset=data[:6])
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    reset_accelerate()
    return {**outcome(trainer), "eval": evaluated}


@pytest.mark.parametrize(
    ("grids", "padded"),
    [
        pytest.param([(4, 2)], True, id="padded"),
        pytest.param(GRIDS[1:], False, id="rows-all_grids", marks=pytest.mark.slow),
        pytest.param(GRIDS[1:], True, id="padded-all_grids", marks=pytest.mark.slow),
    ],
)
def test_any_grid_equals_one_process(grids: list[tuple[int, int]], padded: bool, tmp_path: Path) -> None:
    (one,) = run_distributed(train, 1, 1, 1, padded, str(tmp_path))
    assert one["history"][1][0] < one["history"][0][0], "nothing was learnt"
    for world, degree in grids:
        for run in run_distributed(train, world, world, degree, padded, str(tmp_path)):
            assert_same(run, one, (world, degree))
            assert run["eval"] == pytest.approx(one["eval"], rel=1e-4)


def own_loop(degree: int) -> list[float]:
    reset_accelerate()
    accelerator = SequenceParallelAccelerator(cpu=True, sequence_parallel_size=degree)
    model = masked_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    data: Any = masked_rows(True)
    loader = torch.utils.data.DataLoader(data, batch_size=4 * degree // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        loss = model(**accelerator.shard_batch(batch), num_items_in_batch=accelerator.num_items(batch)).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
    reset_accelerate()
    return losses


def test_with_the_accelerator() -> None:
    (one,) = run_distributed(own_loop, 1, 1)
    for world, degree in ((2, 2), (2, 1), (4, 2)):
        for losses in run_distributed(own_loop, world, degree):
            assert losses == pytest.approx(one, rel=1e-5)
