"""Pretrain with transformers' Trainer, every sequence spread over all processes.

    python examples/trainer.py                        # one process
    torchrun --nproc_per_node 2 examples/trainer.py   # two, each with half of every sequence

Both print the same losses, to rounding. The model is written to runs/examples/trainer.
"""

import argparse
from pathlib import Path

import torch
from transformers import set_seed

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments

LENGTH = 1024


def main() -> None:
    args = LinearLlama3TrainingArguments(
        output_dir="runs/examples/trainer",
        use_cpu=not torch.accelerator.is_available(),
        max_steps=20,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        warmup_steps=2,
        logging_steps=5,
        save_strategy="no",
        linear_strategy="lasp2",  # of the linear layers; others: lasp1, all_scan, all_to_all, auto
        softmax_strategy="lasp2h",  # of the softmax layers; others: ring, token_ring, ulysses, rsa, auto
        report_to="none",
        disable_tqdm=True,
    )
    set_seed(args.seed)
    text = Path(argparse.__file__).read_bytes()  # a Python module as training text; a token is a byte
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    config = LinearLlama3Config(
        vocab_size=256,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_attention_type="gla",
        full_attention_interval=4,  # every fourth layer is a softmax layer
    )
    trainer = LinearLlama3Trainer(
        model=LinearLlama3ForCausalLM(config),
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids.split(LENGTH)[:-1]],
    )
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    if trainer.is_world_process_zero():
        print("losses:", *(f"{loss:.4f}" for loss in losses))


if __name__ == "__main__":
    main()
