"""The model card: a checkpoint's description, origin and license."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .hub import AUTO_CLASSES, CARD_NAME, NOTICE_NAME, SAVED_CARD, SAVED_CARDS, final_folder, is_generated_card

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

LLAMA_LICENSES = {"llama3": "Meta Llama 3", "llama3.1": "Llama 3.1", "llama3.2": "Llama 3.2", "llama3.3": "Llama 3.3"}
"""The Hub's name of a license -> the models in the title of that Community License."""


def model_card(
    model: PreTrainedModel, *, repo_id: str, mark: str = SAVED_CARD, datasets: list[str] | None = None, **facts: Any
) -> ModelCard:
    """Return the card of a model, based on its config and on the card of the weights that it started from.

    Args:
        repo_id: the folder or repository that the card's example loads.
        mark: the line by which a later save recognizes a generated card.
        facts: further values of model_cards/template.md, such as `training` (a table) and `sequence_length`.
    """
    config, classes = model.config, {kind.__name__ for kind in type(model).__mro__}
    kind = ["linear-attention", "hybrid" if config.has_softmax_layers else "recurrent"] if config.linear_layers else []
    auto_class = next((auto for auto, name in AUTO_CLASSES.items() if name in classes), "AutoModel")
    origin = _origin(model)
    if origin.get("base_model") == repo_id:  # pushed back to where it came from
        del origin["base_model"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[auto_class],
        tags=[*model.model_tags, *kind, "custom_code"],
        datasets=datasets,
        **origin,
    )
    values = {
        "mark": mark,
        "model_name": Path(repo_id).name,
        "repo_id": repo_id,
        "auto_class": auto_class,
        "layer_pattern": config.layer_pattern,
        "linear_layers": len(config.linear_layers),
        "num_layers": config.num_hidden_layers,
        "mixer": config.linear_attention_type,
        "parameters": f"{model.num_parameters():,}",
        "state_shape": " x ".join(map(str, config.linear_state_shape)),
        "license_notice": llama_notice(origin.get("license")),
    }
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **(values | facts))


def add_card(model: PreTrainedModel, folder: Path, repo_id: str) -> None:
    """Write the card, and the notice that Llama's licenses require, into a folder to be saved or uploaded.

    The user's own card, next to the checkpoint or already in the repository, takes precedence.
    """
    card, own = folder / CARD_NAME, final_folder(folder) / CARD_NAME
    if is_generated_card(card, *SAVED_CARDS):
        if is_generated_card(own, *SAVED_CARDS):
            model_card(model, repo_id=repo_id).save(card)
        else:
            shutil.copyfile(own, card)
    notice = llama_notice(_origin(model).get("license"))
    if notice is not None and not (final_folder(folder) / NOTICE_NAME).exists():
        (folder / NOTICE_NAME).write_text(notice + "\n", encoding="utf-8")


def _origin(model: PreTrainedModel) -> dict[str, Any]:
    if model.provenance is not None:
        return dict(model.provenance)
    return provenance(model.config.name_or_path, local_files_only=True)


def provenance(source: str, **hub: Any) -> dict[str, Any]:
    """Return `base_model` and `license` for the card of a model that was loaded from `source`.

    The license is that of the folder's or repository's own card; so is the base model of a folder. Without a card, both
    follow from the name: Llama's licenses require that derived models have Llama in their name.

    Args:
        source: a folder or Hub name; "" if the model was not loaded.
        hub: options of `from_pretrained` that locate a repository's card: `revision`, `cache_dir`, ...
    """
    folder, on_hub = Path(source), re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    if not source or not (folder.is_dir() or on_hub):
        return _license_by_name(folder)
    card = folder / CARD_NAME if folder.is_dir() else _card_on_hub(source, **hub)
    known = {} if card is None else _metadata(card)
    origin: dict[str, Any] = {key: known[key] for key in ("license", "license_name", "license_link") if key in known}
    if not folder.is_dir():
        origin["base_model"] = source
    elif "base_model" in known:
        origin["base_model"] = known["base_model"]
    elif re.fullmatch(r"(Meta-)?Llama-3(\.\d)?-\d+B(-Instruct)?", folder.name):
        origin["base_model"] = f"meta-llama/{folder.name}"
    return _license_by_name(folder) | origin


def _license_by_name(folder: Path) -> dict[str, Any]:
    version = re.match(r"(?:Meta-)?Llama-(3(?:\.\d)?)-", folder.name)
    return {"license": f"llama{version[1]}"} if version else {}


def _card_on_hub(repo_id: str, **hub: Any) -> Path | None:
    try:
        found = cached_file(
            repo_id, CARD_NAME, **hub, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except OSError:  # no such repository: the weights came from elsewhere
        return None
    return None if found is None else Path(found)


def _metadata(card: Path) -> dict[str, Any]:
    try:
        return metadata_load(card) or {}
    except (OSError, UnicodeError, yaml.YAMLError):  # an unreadable card must not stop a save
        return {}


def llama_notice(license_name: str | None) -> str | None:
    """Return the attribution that Llama's licenses require for derived models; None for other licenses."""
    if license_name not in LLAMA_LICENSES:
        return None
    name = LLAMA_LICENSES[license_name]
    return (
        f"{name} is licensed under the {name} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
    )
