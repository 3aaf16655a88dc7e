"""What a run leaves beside its weights: the loss as a plot, and a model card."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from ..modeling import LinearLlama3Config
from .recipe import Recipe

PLOT_NAME, CARD_NAME = "loss.png", "README.md"


def plot_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Loss, gradient norm and tokens a second of `trainer.state.log_history` as a PNG."""
    from matplotlib.figure import Figure  # slow to import; a figure without pyplot needs no display

    panels = (("loss", "loss"), ("grad_norm", "gradient norm"), ("train_tokens_per_second", "tokens a second"))
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), linewidth=1.5)
        axes.set(xlabel="step", title=label)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def write_model_card(
    folder: Path, config: LinearLlama3Config, recipe: Recipe, history: list[dict[str, Any]], facts: dict[str, Any]
) -> None:
    """`README.md` with the front matter that the Hub reads. `facts`: further rows of the table of the training."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    rows = {
        "data": recipe.data.dataset or recipe.data.files,
        "sequence length": recipe.sequence_length,
        "first and last logged loss": f"{losses[0]:.4f}, {losses[-1]:.4f}" if losses else "not logged",
        **facts,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"accelerate {accelerate.__version__}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    kind = "hybrid" if config.has_softmax_layers else "recurrent"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            "linear_llama3",
            "linear-attention",
            "hybrid" if config.has_softmax_layers else "recurrent",
            "custom_code",
        ],
        datasets=[recipe.data.dataset] if recipe.data.dataset else None,
    )
    layers = "".join("N" if kind == "full_attention" else "L" for kind in config.layer_types or [])
    card = f"""---
{data.to_yaml()}
---

# {folder.resolve().name}

A Linear-Llama3 model: {config.linear_attention_type} linear attention in the layers L, softmax attention in the
layers N: `{layers}`. {config.num_hidden_layers} layers, hidden size {config.hidden_size},
{config.num_attention_heads} query heads, {config.num_key_value_heads} key/value heads. A linear layer decodes from a
state of {config.linear_num_key_value_heads} x {config.linear_key_head_dim} x {config.linear_value_head_dim} float32
numbers, whatever the length of the text.

## Use

    pip install linear-llama3

```python
import linear_llama3  # registers the model; or pass trust_remote_code=True
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder.resolve().name}")
tokenizer = AutoTokenizer.from_pretrained("{folder.resolve().name}")
```

## Training

| | |
|---|---|
{table}

![loss]({PLOT_NAME})

## Limits

No assisted decoding, no quantised cache, no GGUF or vLLM. Not evaluated beyond the training loss.
"""
    ModelCard(card).save(folder / CARD_NAME)
