"""`cache_implementation="static"`: the text of the dynamic cache, in memory that is allocated in advance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from linear_llama3.modeling import RecurrentCache
from tests.helpers.generation import MODELS, feed, generate, greedy
from tests.helpers.tiny import tiny_model, tokens


@pytest.mark.parametrize("prefill_chunk_size", [None, 3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("mixer", "interval"), [*MODELS, ("gla", 1)])
def test_greedy_text_equals_that_of_complete_forwards(
    mixer: str, interval: int, prefill_chunk_size: int | None
) -> None:
    model = tiny_model(mixer, full_attention_interval=interval)
    x = tokens(2, 7)
    out = generate(model, x, cache_implementation="static", prefill_chunk_size=prefill_chunk_size)
    assert torch.equal(out, greedy(model, x, 8))


@pytest.mark.parametrize("prefill_chunk_size", [None, 4, 1])
@pytest.mark.parametrize("interval", [2, 1, 0])
@torch.no_grad()
def test_left_padding(interval: int, prefill_chunk_size: int | None) -> None:
    """`generate` makes the masks of a static cache itself, also that of a prompt fed token by token."""
    model = tiny_model("basic", full_attention_interval=interval, linear_feature_map="elu_plus_one")
    x, padding = tokens(1, 5), torch.full((1, 9), 3)
    options: dict[str, Any] = {
        "cache_implementation": "static",
        "prefill_chunk_size": prefill_chunk_size,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    alone = generate(model, x, output_logits=True, return_dict_in_generate=True)
    mask = torch.tensor([[0] * 9 + [1] * 5])
    padded = generate(model, torch.cat([padding, x], 1), attention_mask=mask, **options)
    torch.testing.assert_close(torch.cat(padded.logits), torch.cat(alone.logits), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("interval", [2, 0])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples(interval: int, options: dict[str, Any]) -> None:
    model = tiny_model("retention", full_attention_interval=interval)
    outputs = []
    for implementation in ("static", "dynamic"):
        torch.manual_seed(3)
        outputs.append(generate(model, tokens(2, 6), cache_implementation=implementation, **options))
    assert torch.equal(*outputs)


@torch.no_grad()
def test_given_to_the_model() -> None:
    model, x = tiny_model("gla"), tokens(2, 12)
    cache = StaticCache(config=model.config, max_cache_len=12)
    logits = torch.cat([model(piece, past_key_values=cache).logits for piece in x.split([5, 1, 1, 5], 1)], 1)
    torch.testing.assert_close(logits, model(x).logits, rtol=1e-3, atol=1e-3)


def test_only_a_static_cache_asks_generate_to_compile() -> None:
    """transformers compiles the decoding step of compileable caches, on GPUs."""
    pure = tiny_model("gla", full_attention_interval=0)
    for implementation, compileable in ((None, False), ("static", True)):
        out = generate(pure, tokens(1, 5), cache_implementation=implementation, return_dict_in_generate=True)
        assert isinstance(out.past_key_values, RecurrentCache)
        assert out.past_key_values.is_compileable == compileable


def test_the_count_is_not_changed_by_later_steps() -> None:
    _, cache = feed(tiny_model("gla", full_attention_interval=0), tokens(1, 5), [5])
    before = cache.get_seq_length()
    cache.advance(3, before.device)
    assert (before, cache.get_seq_length()) == (5, 8)
    assert cache.get_mask_sizes(2, 0) == (10, 0)
