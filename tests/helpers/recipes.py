"""Recipes of tiny models, their files, and launches of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent.parent
MODEL = {
    "linear_attention_type": "lightning",
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """One token per letter."""
    letters = {letter: i for i, letter in enumerate("_.abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="_")
    fast.save_pretrained(folder)
    return fast


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    for name, text in (("1.txt", "abcdef"), ("2.txt", "g"), ("3.txt", "hijklmnopqrst"), ("4.txt", "uv")):
        (folder / name).write_text(text)


def recipe_with(folder: Path, **changes: Any) -> Path:
    """Write a valid recipe with these changes; None removes a key."""
    content = {
        "model": MODEL,
        "tokenizer": str(folder / "tokenizer"),
        "data": {"files": str(folder / "corpus")},
        "sequence_length": 16,
        "training": {
            "output_dir": str(folder / "out"),
            "max_steps": 2,
            "use_cpu": True,
            "report_to": "none",
            "logging_steps": 1,
            "per_device_train_batch_size": 1,
        },
    } | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


def launch(recipe: Path, processes: int, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--multi_gpu"] if processes > 1 else []
    command += ["--num_processes", str(processes), "-m", "linear_llama3.trainer", str(recipe)]
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
