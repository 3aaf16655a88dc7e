"""Presets: configurations of the literature by name.

Every shape is a JSON file in model_cards/, which `AutoConfig.from_pretrained(path)` reads as well; the card beside
it says where each number comes from. `python -m linear_llama3.modeling.presets [name ...]` prints what they weigh.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .mixers import MIXERS
from .releases import CACHE_NAME

if TYPE_CHECKING:
    from .configuration import LinearLlama3Config

FOLDER = Path(__file__).resolve().parent.parent / "model_cards"  # in a checkout and in the wheel
RATIOS = ("pure", "hybrid-1-8", "hybrid-1-4", "hybrid-1-2")  # those of the LASP-2 paper; any 1-n is understood


def shapes() -> list[str]:
    """Names of the JSON files: what a preset's name begins with."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def catalogue() -> list[str]:
    """The presets that the cards list: the paper's model with every mixer and ratio, the other shapes as they are."""
    paper = "linear-llama3-1b"
    variants = [f"{paper}-{mixer}-{ratio}" for mixer in MIXERS for ratio in RATIOS]
    return variants + [shape for shape in shapes() if shape != paper]


def preset_fields(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The config's fields for `shape[-mixer][-pure | -hybrid-1-n]`; what the name leaves out is the shape's own.

    Raises `ValueError` for an unknown name, or layers that the ratio does not divide.
    """
    shape, mixer = ("|".join(map(re.escape, names)) for names in (shapes(), MIXERS))
    parts = re.fullmatch(rf"({shape})(?:-({mixer}))?(?:-(pure|hybrid-1-([1-9]\d*)))?", name)
    if parts is None:
        raise ValueError(
            f"a preset is named shape[-mixer][-pure or -hybrid-1-n], got {name!r}; the shapes are "
            f"{', '.join(shapes())}, the mixers {', '.join(MIXERS)}"
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
            f"1/{interval} of {name!r} must be softmax, got {layers} layers, no multiple of {interval}; name another "
            "ratio, or each layer in layer_types"
        )
    return fields


def weigh(config: LinearLlama3Config) -> tuple[int, int, int]:
    """(parameters, bytes of state of a sequence, bytes of keys and values of a token in bfloat16).

    Read off a model and its cache on the meta device, where nothing is allocated.
    """
    from .model import LinearLlama3ForCausalLM

    with torch.device("meta"), torch.no_grad():
        model = LinearLlama3ForCausalLM(config).eval()
        cache = model.model(torch.zeros(1, 1, dtype=torch.long), use_cache=True)[CACHE_NAME]
    states = [cache.layers[layer].recurrent_states[0] for layer in config.linear_layers]
    pairs = [layer for index, layer in enumerate(cache.layers) if index not in config.linear_layers]
    return (
        model.num_parameters(),
        sum(state.numel() * state.element_size() for state in states),
        sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in pairs),
    )


def layer_pattern(config: LinearLlama3Config) -> str:
    """As "4 x LLLN": L is a linear layer, N a softmax layer."""
    letters = "".join("N" if layer == "full_attention" else "L" for layer in config.layer_types or ())
    period = next(n for n in range(1, len(letters) + 1) if letters == letters[:n] * (len(letters) // n))
    return f"{len(letters) // period} x {letters[:period]}"


def table(names: list[str]) -> str:
    """Markdown: layers, parameters and sizes of some presets."""
    from .configuration import LinearLlama3Config

    rows = ["| preset | layers | parameters | state, bytes | K, V of a token, bytes |", "|---|---|---|---|---|"]
    for name in names:
        config = LinearLlama3Config.from_preset(name)
        sizes = " | ".join(f"{size:,}" for size in weigh(config))
        rows.append(f"| {name} | {layer_pattern(config)} | {sizes} |")
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        print(table(sys.argv[1:] or catalogue()))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
