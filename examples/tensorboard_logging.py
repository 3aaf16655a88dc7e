"""Log a training run to TensorBoard (`pip install tensorboard`).

    python examples/tensorboard_logging.py
    tensorboard --logdir runs/examples/tensorboard

Besides the loss, every tracker of `report_to` receives tokens per second, FLOPs, MFU and peak memory.
"""

import argparse
import os
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import set_seed

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments

LOGS = Path("runs/examples/tensorboard")


def main() -> None:
    run = LOGS / f"run-{len(list(LOGS.glob('run-*'))) + 1}"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run)
    args = LinearLlama3TrainingArguments(
        output_dir=str(run),
        use_cpu=not torch.accelerator.is_available(),
        max_steps=10,
        learning_rate=3e-3,
        logging_steps=2,
        save_strategy="no",
        report_to="tensorboard",
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
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    trainer = LinearLlama3Trainer(
        model=LinearLlama3ForCausalLM(config),
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids.split(1024)[:-1]],
    )
    trainer.train()

    events = EventAccumulator(str(run)).Reload()
    for tag in sorted(events.Tags()["scalars"]):
        print(f"{tag:32}", *(f"{event.value:.4g}" for event in events.Scalars(tag)))
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses[-1] < losses[0] and "train/tokens_per_second" in events.Tags()["scalars"]


if __name__ == "__main__":
    main()
