"""Presets: configurations of the literature by name.

Every shape is a JSON file in model_cards/, which `AutoConfig.from_pretrained(path)` reads as well. The card next to it
gives the source of each number. `linear-llama3 presets` lists all presets with their sizes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "model_cards"  # in a checkout and in the wheel


def shapes() -> list[str]:
    """Return the names of the JSON files, with which the names of presets begin."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def preset_fields(name: str, mixers: Iterable[str], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the config's fields for a preset: those of its shape, changed by the rest of its name and `overrides`.

    Args:
        name: shape[-mixer][-pure or -hybrid-1-n].
        mixers: names of the known mixers.

    Raises:
        ValueError: the name is unknown, or the number of layers is not a multiple of n.
    """
    shape, mixer = ("|".join(map(re.escape, names)) for names in (shapes(), mixers))
    parts = re.fullmatch(rf"({shape})(?:-({mixer}))?(?:-(pure|hybrid-1-([1-9]\d*)))?", name)
    if parts is None:
        raise ValueError(
            f"a preset is named shape[-mixer][-pure or -hybrid-1-n], got {name!r}; the shapes are "
            f"{', '.join(shapes())}, the mixers {', '.join(mixers)}"
        )
    fields: dict[str, Any] = json.loads((FOLDER / f"{parts[1]}.json").read_text(encoding="utf-8"))
    del fields["model_type"]
    if parts[2]:
        fields["linear_attention_type"] = parts[2]
    if parts[3]:
        fields["full_attention_interval"] = int(parts[4] or 0)
    fields |= overrides
    layers, interval = fields["num_hidden_layers"], fields["full_attention_interval"]
    if interval and layers % interval and "layer_types" not in overrides:
        raise ValueError(
            f"1/{interval} of {name!r} must be softmax, got {layers} layers, which is not a multiple of {interval}; "
            "choose another ratio, or give the type of each layer in layer_types"
        )
    return fields
