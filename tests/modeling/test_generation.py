"""Caches and generation: every way of feeding the tokens gives what the whole sequence at once gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.modeling import CountingCache
from tests.modeling.tiny import MIXER_NAMES, tiny_model, tokens

KINDS = [(mixer, 2) for mixer in MIXER_NAMES] + [(mixer, 0) for mixer in MIXER_NAMES]


def feed(model: LinearLlama3ForCausalLM, x: Tensor, pieces: list[int], **kwargs: Any) -> tuple[Tensor, Any]:
    """Logits and cache of `x` fed in pieces."""
    cache, logits, start = None, [], 0
    mask = kwargs.pop("attention_mask", None)
    for length in pieces:
        part_mask = None if mask is None else mask[:, : start + length]
        out = model(x[:, start : start + length], past_key_values=cache, attention_mask=part_mask, use_cache=True)
        cache, start = out.past_key_values, start + length
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 1, 4], [7, 5]], ids=["one", "prefill-decode", "chunks"])
@pytest.mark.parametrize(("mixer", "interval"), KINDS)
@torch.no_grad()
def test_cached_equals_uncached(mixer: str, interval: int, pieces: list[int]) -> None:
    model = tiny_model(mixer, full_attention_interval=interval)
    x = tokens(2, 12)
    logits, cache = feed(model, x, pieces)
    torch.testing.assert_close(logits, model(x, use_cache=False).logits, rtol=1e-3, atol=1e-3)
    layer = cache.layers[0]
    assert layer.recurrent_states[0].shape == (2, *model.config.linear_state_shape)
    assert layer.recurrent_states[0].dtype == torch.float32
    assert layer.conv_states[0] is None
    assert layer.has_previous_state[0]
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("pieces", [[1] * 12, [3, 9]], ids=["one", "chunks"])
@pytest.mark.parametrize("interval", [2, 0])
@torch.no_grad()
def test_cached_with_left_padding(interval: int, pieces: list[int]) -> None:
    model = tiny_model("gla", full_attention_interval=interval, linear_feature_map="elu_plus_one")
    x = tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    logits, _ = feed(model, x, pieces, attention_mask=mask)
    torch.testing.assert_close(logits[:1, 5:], model(x[:1, 5:]).logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[1:], model(x[1:]).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("interval", [2, 0])
@torch.no_grad()
def test_reset_and_reorder(interval: int) -> None:
    model = tiny_model("retention", full_attention_interval=interval)
    x = tokens(2, 9)
    _, cache = feed(model, x, [6])
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = model(x[:, 6:].flip(0), past_key_values=cache).logits.flip(0)
    torch.testing.assert_close(swapped, model(x).logits[:, 6:], rtol=1e-3, atol=1e-3)
    if interval == 0:  # resetting a DynamicCache keeps the length of its softmax layers
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(x, past_key_values=cache).logits, model(x).logits)


@torch.no_grad()
def greedy(model: LinearLlama3ForCausalLM, x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        x = torch.cat([x, model(x, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return x


@pytest.mark.parametrize(("mixer", "interval"), KINDS)
def test_greedy(mixer: str, interval: int) -> None:
    model = tiny_model(mixer, full_attention_interval=interval)
    x = tokens(2, 7)
    expected = greedy(model, x, 8)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"prefill_chunk_size": 1}):
        assert torch.equal(generate(model, x, **options), expected), options


def generate(model: LinearLlama3ForCausalLM, x: Tensor, **options: Any) -> Tensor:
    defaults = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = options.pop("attention_mask", torch.ones_like(x))
    return model.generate(x, attention_mask=mask, **{**defaults, **options})


@pytest.mark.parametrize("prefill_chunk_size", [None, 1, 4])
@pytest.mark.parametrize("interval", [2, 0])
def test_left_padded_batch(interval: int, prefill_chunk_size: int | None) -> None:
    model = tiny_model("gla", full_attention_interval=interval, linear_feature_map="elu_plus_one")
    short, long = tokens(1, 5), tokens(1, 9, seed=2)
    x = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), long])
    out = generate(model, x, attention_mask=(x != 0).long(), prefill_chunk_size=prefill_chunk_size)
    assert torch.equal(out[:1, 4:], greedy(model, short, 8))
    assert torch.equal(out[1:], greedy(model, long, 8))


@pytest.mark.parametrize("interval", [2, 0])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_cached_generation_equals_uncached(interval: int, options: dict[str, Any]) -> None:
    model = tiny_model("lightning", full_attention_interval=interval)
    x = tokens(2, 6)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outputs.append(generate(model, x, use_cache=use_cache, **options))
    assert torch.equal(*outputs)


def test_static_cache() -> None:
    model = tiny_model("gla")
    x = tokens(2, 7)
    assert torch.equal(generate(model, x, cache_implementation="static"), greedy(model, x, 8))


def test_continuing_with_a_returned_cache() -> None:
    for interval in (2, 0):
        model = tiny_model("gla", full_attention_interval=interval)
        x = tokens(1, 7)
        first = model.generate(
            x,
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        more = generate(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=5)
        assert torch.equal(more, greedy(model, x, 8))


def test_refused() -> None:
    model = tiny_model("gla")
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, tokens(1, 7), prompt_lookup_num_tokens=2)
    pure = tiny_model("gla", full_attention_interval=0)
    with pytest.raises(ValueError, match="got cache_implementation='static'; leave cache_implementation out"):
        generate(pure, tokens(1, 7), cache_implementation="static")
    with pytest.raises(ValueError, match="needs a CountingCache, got DynamicCache"):
        pure(tokens(1, 7), past_key_values=DynamicCache(config=pure.config))
    assert isinstance(pure(tokens(1, 7)).past_key_values, CountingCache)
    with pytest.raises(ValueError, match=r"layer 0 is linear .* build it with DynamicCache\(config=model.config\)"):
        model(tokens(1, 7), past_key_values=DynamicCache())
