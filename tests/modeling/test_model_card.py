"""The template of model cards renders to valid cards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from tests.helpers.tiny import tiny_model
from tests.test_packaging import pyproject

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "model_cards" / "template.md"


def test_template_renders_and_parses() -> None:
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license="apache-2.0",
        tags=["linear_llama3", "linear-attention", "hybrid", "custom_code"],
    )
    values: dict[str, Any] = {
        "mark": "Written by hand.",
        "auto_class": "AutoModelForCausalLM",
        "model_name": "Linear-Llama3 tiny",
        "repo_id": "someone/tiny",
        "linear_layers": "3",
        "num_layers": "4",
        "layer_pattern": "LLLS",
        "mixer": "gla",
        "parameters": "4.2 M",
        "state_shape": "2 heads of 64 x 64",
        "sequence_length": "8,192",
        "training": {"tokens": "1,000,000", "devices": "2 CPU processes, sequence-parallel"},
        "limits": "A demonstration.",
        "license_notice": "Apache-2.0",
    }
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), **values)
    parsed = ModelCard(str(card))
    assert parsed.data.to_dict() == data.to_dict()
    for value in values.values():
        for text in value.values() if isinstance(value, dict) else [value]:
            assert text in parsed.text
    assert "{{" not in parsed.text and "{%" not in parsed.text


def test_the_card_of_a_model_without_linear_layers(tmp_path: Path) -> None:
    """The card mentions no mixer and no state in facts, tags and limits."""
    model = tiny_model("gla", full_attention_interval=1)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["linear_llama3", "custom_code"]
    assert "softmax attention in all of its 4 layers" in card.text
    for word in ("linear attention", "linear layer", "recurrent", "state", "mixer", "gla", "assisted"):
        assert word not in card.text, word


@pytest.mark.parametrize("interval", [0, 1, 2])
def test_the_card_says_how_to_install(interval: int, tmp_path: Path) -> None:
    """Links are those of pyproject.toml, and nothing is installed by a name that no package index has."""
    tiny_model("gla", full_attention_interval=interval).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    urls = pyproject()["project"].get("urls", {}).values()
    assert set(re.findall(r"https?://[^)\s]+", card)) <= set(urls)
    assert re.findall(r"pip install.*", card) == ["pip install ."]


def test_no_text_suggests_installing_from_a_package_index() -> None:
    for folder in ("", "model_cards", "modeling", "trainer", "linear_llama3", "scripts"):
        for path in (ROOT / folder).glob("**/*" if folder else "*.md"):
            if path.suffix in (".md", ".py", ".yaml", ".sh"):
                text = path.read_text(encoding="utf-8")
                assert not re.search(r"pip install[\s#'\"]+linear[-_]llama3", text), path
