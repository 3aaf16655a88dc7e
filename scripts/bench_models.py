"""Models of one size for bench_decode.py and bench_training_step.py: Llama, and Llama with linear attention."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.modeling import MIXERS

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2**17,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = "Llama (SDPA)"
KINDS = {"pure linear": 0, "hybrid 1/4": 4}  # interval of softmax layers
NAMES = [LLAMA, *(f"{mixer}, {kind}" for kind in KINDS for mixer in MIXERS)]


def make_model(name: str) -> PreTrainedModel:
    """Return the model of this name, one of NAMES, with random float32 weights."""
    torch.manual_seed(0)
    if name == LLAMA:
        return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="sdpa"))
    mixer, kind = name.split(", ")
    interval = KINDS[kind]
    config = LinearLlama3Config(**SIZES, linear_attention_type=mixer, full_attention_interval=interval)
    return LinearLlama3ForCausalLM(config)


def random_ids(length: int) -> torch.Tensor:
    """Return token ids `[1, length]`."""
    return torch.randint(SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))


def setting() -> dict[str, Any]:
    """Return the date, the hardware, the versions and the sizes of the models."""
    return {
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "sizes": SIZES,
    }


def describe() -> str:
    """Return the setting in one line."""
    run = setting()
    return f"float32, {run['hardware']}, {run['versions']}, {run['date']}"


def save(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path is not None:
        path.write_text(json.dumps({"setting": setting(), "rows": rows}, indent=1) + "\n")
