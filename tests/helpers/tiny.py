"""Tiny models for the tests of `linear_llama3.modeling`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM, LinearLlama3ForMaskedLM

MIXER_NAMES = ("basic", "lightning", "retention", "gla", "based", "rebased")
BIDIRECTIONAL_MIXERS = ("basic", "based", "rebased")  # those without a decay
FILES = ["README.md", "config.json", "generation_config.json", "linear_llama3_hub.py", "model.safetensors"]
"""Of a saved model."""

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_config(mixer: str = "gla", **fields: Any) -> LinearLlama3Config:
    """Return a config with layers LNLN of one mixer; `full_attention_interval=0`: all linear, 1: all softmax."""
    return LinearLlama3Config(**{**SIZES, "linear_attention_type": mixer, "full_attention_interval": 2, **fields})


def tiny_model(mixer: str = "gla", *, seed: int = 0, **fields: Any) -> LinearLlama3ForCausalLM:
    """Return a model in evaluation mode, with weights and decays that are large enough to matter in every layer."""
    torch.manual_seed(seed)
    fields = {"initializer_range": 0.3, "gate_bias_init": -3.0, **fields}
    return LinearLlama3ForCausalLM(tiny_config(mixer, **fields)).eval()


def bidirectional_config(mixer: str = "basic", **fields: Any) -> LinearLlama3Config:
    return tiny_config(mixer, is_causal=False, **{"initializer_range": 0.3, **fields})


def tiny_masked_lm(mixer: str = "basic", **fields: Any) -> LinearLlama3ForMaskedLM:
    """Return a bidirectional model in evaluation mode."""
    torch.manual_seed(0)
    return LinearLlama3ForMaskedLM(bidirectional_config(mixer, **fields)).eval()


def tokens(batch: int, length: int, *, seed: int = 1) -> Tensor:
    """Return random ids `[batch, length]` without special tokens."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of all gradients by parameter name; a parameter that learns must have one."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, f"{name} has no gradient"
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
