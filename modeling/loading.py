"""Load a causal language model, its config and its tokenizer by name; a wrong name raises a one-line ValueError."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file


def load_model(name: str, device: torch.device | str | None = None) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, in the dtype of its weights.

    Args:
        name: a folder or Hub name with weights; for an adapter, its base model is loaded as well.
        device: by default the accelerator if there is one, else the CPU.

    Raises:
        ValueError: there is no such model, or weights are missing (a classifier's checkpoint lacks the head).
    """
    options = {"trust_remote_code": False, "output_loading_info": True}
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the model must be a folder or a Hub name with a causal language model, got {name!r}: {first_line(error)}"
        ) from error
    if loaded["missing_keys"]:
        raise ValueError(
            f"a {type(model).__name__} needs all of its weights, got {name!r} without "
            f"{', '.join(sorted(loaded['missing_keys']))}; give the checkpoint of a causal language model"
        )
    return model.to(device or torch.accelerator.current_accelerator() or "cpu").eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub name.

    Raises:
        ValueError: there is no such tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer must be a folder or a Hub name with a tokenizer, got {name!r}: {first_line(error)}"
        ) from error


def load_config(name: str) -> PreTrainedConfig:
    """Load the config of a folder or Hub name; for an adapter, that of its base model.

    Raises:
        ValueError: there is no such model.
    """
    try:
        if (adapter := find_adapter_config_file(name)) is not None:
            name = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the model must be a folder or a Hub name with a config, got {name!r}: {first_line(error)}"
        ) from error


def load_tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, and check that it fits the model's config. No weights are loaded.

    Raises:
        ValueError: there is no such model, it has no tokenizer, or it has fewer embeddings than tokens.
    """
    config = load_config(model)  # first: a wrong name is reported as a missing model
    tokenizer = load_tokenizer(model)
    check_vocabulary(tokenizer, config)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raise ValueError unless the model has an embedding for each of the tokenizer's tokens."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the model must have an embedding for each of the tokenizer's {len(tokenizer)} tokens, got vocab_size = "
            f"{config.vocab_size}; use the model's own tokenizer, or leave vocab_size out"
        )


def first_line(error: Exception) -> str:
    """Return the first line of transformers' message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
