"""Files saved with the weights of a run: a plot of its curves, its recipe, and a model card."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from transformers import PreTrainedModel

from ...modeling.hub import CARD_NAME, RUN_CARD, SAVED_CARDS, is_generated_card
from ...modeling.model_card import model_card
from ..adaptive.profiling import hardware
from .recipe import DataRecipe, Recipe, ValidationRecipe

PLOT_NAME = "loss.png"
RECIPE_NAME = "recipe.yaml"
RECIPE_MARK = "# What a run of linear_llama3 was trained with; replaced by the next run into this folder."
SPEEDS = {  # row of the card's table -> (key of a log entry, text of its median, text without it)
    "tokens a second": ("tokens_per_second", "{:,.0f}", "not logged"),
    "TFLOP/s of the model, per device": ("tflops_per_device", "{:,.4g}", "not logged"),
    "MFU": ("mfu", "{:.1%} of the bfloat16 peak", "unknown (no peak known for this device)"),
}
SECRETS = {"hub_token", "token", "storage_options"}  # keys of a recipe that a card, which is shared, leaves out


def plot_loss(history: list[dict[str, Any]], path: Path) -> None:
    """Plot training and validation loss, gradient norm and tokens a second of a `log_history` as a PNG."""
    from matplotlib.figure import Figure  # slow to import; a figure without pyplot needs no display

    panels = (("loss", "loss"), ("grad_norm", "gradient norm"), ("tokens_per_second", "tokens a second"))
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name, style in ((key, "-"), (f"eval_{key}", "o--")):
            if entries := [entry for entry in history if name in entry]:
                steps, values = ([entry[column] for entry in entries] for column in ("step", name))
                axes.plot(steps, values, style, linewidth=1.5, label=name)
        axes.set(xlabel="step", title=title, **({"ylim": (0, None)} if key == "tokens_per_second" else {}))
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def speed(history: list[dict[str, Any]]) -> dict[str, str]:
    """Return medians over the log entries, since the first ones include one-time costs."""
    rows = {}
    for name, (key, text, unknown) in SPEEDS.items():
        values = [entry[key] for entry in history if key in entry]
        rows[name] = text.format(median(values)) if values else unknown
    return rows


def recipe_text(recipe: Recipe, *, shared: bool = False) -> str:
    """Return the complete recipe as YAML, with the changes made at launch and without secrets.

    Args:
        shared: the text is for readers on other machines, so keep only the last component of absolute paths.
    """

    def shown(content: Any) -> Any:
        if isinstance(content, Mapping):
            return {key: shown(value) for key, value in content.items() if key not in SECRETS}
        if isinstance(content, (list, tuple)):
            return [shown(item) for item in content]
        return portable(content) if shared and isinstance(content, str) else content

    text = yaml.safe_dump(shown(dataclasses.asdict(recipe)), sort_keys=False, allow_unicode=True)
    return f"{RECIPE_MARK}\n{text}"


def portable(text: str) -> str:
    """Return the last component of an absolute path, which exists on one machine only, and any other text unchanged."""
    path = os.path.expanduser(text.removeprefix("file://"))
    return Path(path).name if os.path.isabs(path) else text


def launch_command(environment: Mapping[str, str] = os.environ) -> str:
    """Return the command that starts this run again on every node, with accelerate's settings from the environment."""
    choices = {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(("FSDP_", "PARALLELISM_CONFIG_"))
        or (name.startswith("ACCELERATE_") and value.lower() not in ("", "no", "false", "default"))
    }
    world, local = (int(environment.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    launcher = "python" if world == 1 else f"torchrun --nproc_per_node {local}"
    if world > local:
        launcher += f" --nnodes {world // local} --rdzv_backend c10d --rdzv_endpoint $FIRST_NODE:29500"
    variables = "".join(f"{name}={shlex.quote(portable(value))} " for name, value in choices.items())
    return f"{variables}{launcher} -m linear_llama3.trainer {RECIPE_NAME}"


def _sources(data: DataRecipe | ValidationRecipe) -> str:
    """Return the names of the dataset or the files, without paths of this machine."""
    names = data.dataset or data.files or []
    return ", ".join(map(portable, [names] if isinstance(names, str) else names))


def _validation(recipe: Recipe, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """Return rows for the card's table: the validation data, and the last and lowest loss."""
    if recipe.validation is None:
        return {}
    share, shown = recipe.validation.share, "not logged"
    if evaluations:
        last, best = evaluations[-1], min(evaluations, key=lambda entry: entry["eval_loss"])
        shown = f"{last['eval_loss']:.4f} (perplexity {last['eval_perplexity']:.4g}) at step {last['step']}"
        shown += f"; lowest {best['eval_loss']:.4f} at step {best['step']}"
    return {
        "validation data": _sources(recipe.validation) or f"{share:.2%} of the rows",
        "validation loss": shown,
    }


def write_model_card(
    folder: Path, model: PreTrainedModel, recipe: Recipe, history: list[dict[str, Any]], facts: dict[str, Any]
) -> None:
    """Write `recipe.yaml` and the model card `README.md`, unless the user has replaced them.

    Args:
        facts: further rows of the card's table.
    """
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [entry for entry in history if "eval_loss" in entry and "eval_perplexity" in entry]
    training = {
        "data": _sources(recipe.data),
        **_validation(recipe, evaluations),
        "first and last logged loss": f"{losses[0]:.4f}, {losses[-1]:.4f}" if losses else "not logged",
        **facts,
        **speed(history),
        "hardware": f"{os.environ.get('WORLD_SIZE', '1')} x {hardware(model.device)}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate")),
    }
    if is_generated_card(folder / RECIPE_NAME, RECIPE_MARK):
        (folder / RECIPE_NAME).write_text(recipe_text(recipe), encoding="utf-8")
    if is_generated_card(folder / CARD_NAME, RUN_CARD, *SAVED_CARDS):
        card = model_card(
            model,
            repo_id=recipe.training.get("hub_model_id") or folder.resolve().name,
            mark=RUN_CARD,
            datasets=[recipe.data.dataset] if recipe.data.dataset and not Path(recipe.data.dataset).exists() else None,
            sequence_length=f"{recipe.sequence_length:,}",
            training=training,
            plot=PLOT_NAME,
            recipe=recipe_text(recipe, shared=True),
            command=launch_command(),
            limits=f"Not evaluated beyond the {'validation' if evaluations else 'training'} loss.",
        )
        card.save(folder / CARD_NAME)
