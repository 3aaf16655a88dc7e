"""What a run leaves beside its weights: the loss as a plot, and a model card."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from transformers import PreTrainedModel

from ..modeling.hub import CARD_NAME, RUN_CARD, SAVED_CARDS, replaceable
from ..modeling.model_card import model_card
from .recipe import Recipe

PLOT_NAME = "loss.png"


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
    """`README.md` with what is known of the run, unless the folder has one of the user's.

    Args:
        facts: further rows of the table of the training.
    """
    losses = [entry["loss"] for entry in history if "loss" in entry]
    training = {
        "data": recipe.data.dataset or recipe.data.files,
        "first and last logged loss": f"{losses[0]:.4f}, {losses[-1]:.4f}" if losses else "not logged",
        **facts,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"accelerate {accelerate.__version__}",
    }
    if replaceable(folder / CARD_NAME, RUN_CARD, *SAVED_CARDS):
        card = model_card(
            model,
            repo_id=recipe.training.get("hub_model_id") or str(folder),
            mark=RUN_CARD,
            datasets=[recipe.data.dataset] if recipe.data.dataset else None,
            sequence_length=f"{recipe.sequence_length:,}",
            training=training,
            plot=PLOT_NAME,
            limits="Not evaluated beyond the training loss.",
        )
        card.save(folder / CARD_NAME)
