"""The model card: what a checkpoint's folder says about the model, its origin and its licence."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from transformers import PreTrainedModel

from .hub import AUTO_CLASSES, CARD_NAME, NOTICE_NAME, SAVED_CARD, SAVED_CARDS, final_folder, replaceable

TEMPLATE = Path(__file__).resolve().parent.parent / "model_cards" / "template.md"  # in a checkout and in the wheel
PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
"""Auto class -> the Hub's name of its task."""

LLAMA_LICENCES = {"llama3": "Meta Llama 3", "llama3.1": "Llama 3.1", "llama3.2": "Llama 3.2", "llama3.3": "Llama 3.3"}
"""The Hub's name of a licence -> what it is the Community License of."""


def model_card(
    model: PreTrainedModel, *, repo_id: str, mark: str = SAVED_CARD, datasets: list[str] | None = None, **facts: Any
) -> ModelCard:
    """The card of a model, filled in from its config and from the card of the weights that it started from.

    Args:
        repo_id: the folder or repository that the card's example loads.
        mark: who wrote it, and may replace it.
        facts: further values of model_cards/template.md, as `training` (a table) and `sequence_length`.
    """
    config, classes = model.config, {kind.__name__ for kind in type(model).__mro__}
    auto_class = next((auto for auto, name in AUTO_CLASSES.items() if name in classes), "AutoModel")
    origin = provenance(config.name_or_path)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[auto_class],
        tags=[*model.model_tags, "hybrid" if config.has_softmax_layers else "recurrent", "custom_code"],
        datasets=datasets,
        **origin,
    )
    values = {
        "mark": mark,
        "model_name": Path(repo_id).name,
        "repo_id": repo_id,
        "auto_class": auto_class,
        "layer_pattern": "".join("N" if layer == "full_attention" else "L" for layer in config.layer_types),
        "linear_layers": len(config.linear_layers),
        "num_layers": config.num_hidden_layers,
        "mixer": config.linear_attention_type,
        "parameters": f"{model.num_parameters():,}",
        "state_shape": " x ".join(map(str, config.linear_state_shape)),
        "licence_notice": llama_notice(origin.get("license")),
    }
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **(values | facts))


def add_card(model: PreTrainedModel, folder: Path, repo_id: str) -> None:
    """Puts a card into a folder to be saved or uploaded, and the notice that Llama's licences demand.

    A card of the user's beside the checkpoint, or already in the repository, takes the place of ours.
    """
    card, own = folder / CARD_NAME, final_folder(folder) / CARD_NAME
    if replaceable(card, *SAVED_CARDS):
        if replaceable(own, *SAVED_CARDS):
            model_card(model, repo_id=repo_id).save(card)
        else:
            shutil.copyfile(own, card)
    notice = llama_notice(provenance(model.config.name_or_path).get("license"))
    if notice is not None and not (final_folder(folder) / NOTICE_NAME).exists():
        (folder / NOTICE_NAME).write_text(notice + "\n", encoding="utf-8")


def provenance(source: str) -> dict[str, Any]:
    """`base_model` and `license` for the card of a model that was loaded from `source`, "" if it was not loaded.

    A folder's own card tells both. Without one, names are taken at their word: Llama's licences demand that what
    derives from it is named Llama.
    """
    folder = Path(source)
    origin: dict[str, Any] = {}
    if source and folder.is_dir():
        known = _metadata(folder / CARD_NAME)
        origin = {key: known[key] for key in ("base_model", "license", "license_name", "license_link") if key in known}
        if re.fullmatch(r"(Meta-)?Llama-3(\.\d)?-\d+B(-Instruct)?", folder.name):
            origin.setdefault("base_model", f"meta-llama/{folder.name}")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):  # on the Hub
        origin["base_model"] = source
    if version := re.match(r"(?:Meta-)?Llama-(3(?:\.\d)?)-", folder.name):
        origin.setdefault("license", f"llama{version[1]}")
    return origin


def _metadata(card: Path) -> dict[str, Any]:
    try:
        return metadata_load(card) or {}
    except (OSError, UnicodeError, yaml.YAMLError):  # whatever lies there, it must not cost a save
        return {}


def llama_notice(licence: str | None) -> str | None:
    """The attribution that one of Llama's licences demands of those who share a derived model; None for others."""
    if licence not in LLAMA_LICENCES:
        return None
    name = LLAMA_LICENCES[licence]
    return (
        f"{name} is licensed under the {name} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
    )
