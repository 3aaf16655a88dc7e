"""Train in your own loop with accelerate, every sequence spread over all processes.

    python examples/training_loop.py                        # one process
    torchrun --nproc_per_node 2 examples/training_loop.py   # two, each with half of every sequence

Both print the same losses. On two processes the script also compares the first loss with that of one process.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.trainer import SequenceParallelAccelerator

LENGTH = 1024


def main() -> None:
    torch.manual_seed(0)
    accelerator = SequenceParallelAccelerator(cpu=not torch.accelerator.is_available())

    text = Path(argparse.__file__).read_bytes()  # a Python module as training text; a token is a byte
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = [{"input_ids": row, "labels": row} for row in ids.split(LENGTH)[:40]]
    loader: Any = DataLoader(rows, batch_size=2, shuffle=True)  # type: ignore[arg-type]

    config = LinearLlama3Config(  # three GLA layers, one softmax layer
        vocab_size=256,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_attention_type="gla",
        full_attention_interval=4,
    )
    model = LinearLlama3ForCausalLM(config)
    row = rows[0]["input_ids"][None]
    one_process = model(row, labels=row).loss.item()

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batch = {"input_ids": row.to(accelerator.device), "labels": row.to(accelerator.device)}
    loss = model(**accelerator.shard_batch(batch), num_items_in_batch=accelerator.num_items(batch)).loss
    all_processes = accelerator.reduce(loss.detach(), "mean").item()
    accelerator.print(f"loss of a row on {accelerator.num_processes} process(es): {all_processes:.6f}")
    assert abs(all_processes - one_process) < 1e-5 * one_process

    losses: list[float] = []
    for batch in loader:
        loss = model(**accelerator.shard_batch(batch), num_items_in_batch=accelerator.num_items(batch)).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4f}")
    assert losses[-1] < losses[0] - 1
    accelerator.end_training()


if __name__ == "__main__":
    main()
