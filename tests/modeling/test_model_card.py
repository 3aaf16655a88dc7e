"""The template of the model cards renders, and what it renders is a valid card."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).resolve().parents[2] / "model_cards" / "template.md"


def test_template_renders_and_parses() -> None:
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license="apache-2.0",
        tags=["linear_llama3", "linear-attention", "hybrid", "custom_code"],
    )
    values = {
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
        "licence_notice": "Apache-2.0",
    }
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), **values)
    parsed = ModelCard(str(card))
    assert parsed.data.to_dict() == data.to_dict()
    for value in values.values():
        for text in value.values() if isinstance(value, dict) else [value]:
            assert text in parsed.text
    assert "{{" not in parsed.text and "{%" not in parsed.text
