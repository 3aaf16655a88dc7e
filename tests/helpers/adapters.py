"""LoRA adapters on a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tests.helpers.checkpoint import load

SCALE = 2  # lora_alpha / r


def adapted(folder: str | Path, target_modules: Any = "all-linear") -> PeftModel:
    """Return the model of a folder with LoRA whose B is not zero, so that A has a gradient from the first step on."""
    config = LoraConfig(r=4, lora_alpha=4 * SCALE, target_modules=target_modules, task_type="CAUSAL_LM")
    model = get_peft_model(load(folder), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return model


def adapters(model: PeftModel) -> dict[str, Tensor]:
    """Return the trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
