"""Caches and generated text of tiny models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_llama3 import LinearLlama3ForCausalLM
from tests.helpers.tiny import MIXER_NAMES

MODELS = [(mixer, 2) for mixer in MIXER_NAMES] + [(mixer, 0) for mixer in MIXER_NAMES]
"""(mixer, full_attention_interval): every mixer in a hybrid and in a purely linear model."""


def feed(model: LinearLlama3ForCausalLM, x: Tensor, pieces: list[int], **kwargs: Any) -> tuple[Tensor, Any]:
    """Return the logits and the cache of `x` fed in pieces of these lengths."""
    cache, logits, start = None, [], 0
    mask = kwargs.pop("attention_mask", None)
    for length in pieces:
        part_mask = None if mask is None else mask[:, : start + length]
        out = model(x[:, start : start + length], past_key_values=cache, attention_mask=part_mask, use_cache=True)
        cache, start = out.past_key_values, start + length
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


@torch.no_grad()
def greedy(model: LinearLlama3ForCausalLM, x: Tensor, steps: int) -> Tensor:
    """Return `x` and its greedy continuation, with a forward pass over the complete text for each token."""
    for _ in range(steps):
        x = torch.cat([x, model(x, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return x


def generate(model: LinearLlama3ForCausalLM, x: Tensor, **options: Any) -> Any:
    """Call `model.generate` for 8 greedy tokens, unless `options` say otherwise."""
    defaults = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = options.pop("attention_mask", torch.ones_like(x))
    return model.generate(x, attention_mask=mask, **{**defaults, **options})
