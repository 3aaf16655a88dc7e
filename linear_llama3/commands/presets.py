"""List named models with their sizes: `linear-llama3 presets`."""

from __future__ import annotations

import torch

from ..modeling import MIXERS, LinearLlama3Config, LinearLlama3ForCausalLM
from ..modeling.presets import shapes
from ..modeling.releases import CACHE_NAME

PAPER = "linear-llama3-1b"
RATIOS = ("pure", "hybrid-1-8", "hybrid-1-4", "hybrid-1-2")  # those of the LASP-2 paper; names may use any 1-n


def list_presets() -> list[str]:
    """Return the presets on the model cards: the LASP-2 paper's with every mixer and ratio, and the other shapes."""
    variants = [f"{PAPER}-{mixer}-{ratio}" for mixer in MIXERS for ratio in RATIOS]
    return variants + [shape for shape in shapes() if shape != PAPER]


def model_size(config: LinearLlama3Config) -> tuple[int, int, int]:
    """Return (parameters, bytes of the states of one sequence, bytes of keys and values per token in bfloat16).

    The sizes are read from a model and its cache on the meta device, which allocates nothing.
    """
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


def table(names: list[str]) -> str:
    """Return a Markdown table with the layers, parameters and cache sizes of presets."""
    rows = ["| preset | layers | parameters | state, bytes | K, V of a token, bytes |", "|---|---|---|---|---|"]
    for name in names:
        config = LinearLlama3Config.from_preset(name)
        sizes = " | ".join(f"{size:,}" for size in model_size(config))
        rows.append(f"| {name} | {config.layer_pattern} | {sizes} |")
    return "\n".join(rows)
