"""What a run leaves beside its weights: the loss as a plot, and a model card."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from .recipe import Recipe

PLOT_NAME, CARD_NAME = "loss.png", "README.md"
TEMPLATE = Path(__file__).resolve().parent.parent / "model_cards" / "template.md"  # in a checkout and in the wheel


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
    folder: Path, model: PreTrainedModel, recipe: Recipe, history: list[dict[str, Any]], facts: dict[str, Any]
) -> None:
    """`README.md` with the front matter that the Hub reads. `facts`: further rows of the table of the training."""
    config, name = model.config, folder.resolve().name
    losses = [entry["loss"] for entry in history if "loss" in entry]
    training = {
        "data": recipe.data.dataset or recipe.data.files,
        "first and last logged loss": f"{losses[0]:.4f}, {losses[-1]:.4f}" if losses else "not logged",
        **facts,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"accelerate {accelerate.__version__}",
    }
    start = recipe.model.get("name_or_path")
    kind = "hybrid" if config.has_softmax_layers else "recurrent"
    card = ModelCard.from_template(
        card_data=ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["linear_llama3", "linear-attention", kind, "custom_code"],
            base_model=start if start and not Path(start).exists() else None,  # a name on the Hub
            datasets=[recipe.data.dataset] if recipe.data.dataset else None,
        ),
        template_path=str(TEMPLATE),
        model_name=name,
        repo_id=recipe.training.get("hub_model_id", folder),
        layer_pattern="".join("N" if layer == "full_attention" else "L" for layer in config.layer_types),
        linear_layers=config.layer_types.count("linear_attention"),
        num_layers=config.num_hidden_layers,
        mixer=config.linear_attention_type,
        parameters=f"{model.num_parameters():,}",
        state_shape=" x ".join(map(str, config.linear_state_shape)),
        sequence_length=f"{recipe.sequence_length:,}",
        training=training,
        plot=PLOT_NAME,
    )
    card.save(folder / CARD_NAME)
