"""Generation methods that need to roll back a state raise an error instead of giving wrong text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache, StaticCache

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.modeling import RecurrentCache
from tests.helpers.generation import generate, greedy
from tests.helpers.tiny import SIZES, tiny_model, tokens


@pytest.fixture(params=[2, 0], ids=["hybrid", "pure"])
def model(request: pytest.FixtureRequest) -> LinearLlama3ForCausalLM:
    return tiny_model("gla", full_attention_interval=request.param)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported with stateful models"),
        ({"assistant_model": "itself"}, "assisted generation is not supported with stateful models"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search takes back .* a recurrent state cannot"),
        ({"cache_implementation": "paged"}, r"continuous batching .* got \d linear layers, .* left-padded batch"),
        ({"prefill_chunk_size": 3, "inputs_embeds": torch.zeros(1, 7, 32)}, "a chunked prefill cuts input_ids"),
    ],
    ids=["prompt lookup", "assisted", "contrastive", "continuous batching", "embeddings in chunks"],
)
def test_unsupported_decoding_is_refused(model: LinearLlama3ForCausalLM, options: dict[str, Any], message: str) -> None:
    if "assistant_model" in options:
        options = {"assistant_model": model}
    with pytest.raises(ValueError, match=message):
        generate(model, tokens(1, 7), **options)
    assert generate(model, tokens(1, 7)).shape == (1, 15)  # the model is as before


def test_continuous_batching_is_refused(model: LinearLlama3ForCausalLM) -> None:
    with pytest.raises(ValueError, match="continuous batching keeps keys and values in pages"):
        model.generate_batch([[3, 4, 5]])


def test_a_stateful_assistant_is_refused(model: LinearLlama3ForCausalLM) -> None:
    llama = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with pytest.raises(ValueError, match=r"got assistant_model with \d linear layers; take one whose layers are all"):
        generate(llama, tokens(1, 7), assistant_model=model)


def test_a_quantized_cache_is_refused(model: LinearLlama3ForCausalLM) -> None:
    message = "only supported for models with only full attention layers|keeps a state of fixed size"
    for config in ({}, {"backend": "hqq"}):
        with pytest.raises(ValueError, match=message):
            generate(model, tokens(1, 7), cache_implementation="quantized", cache_config=config)
    with pytest.raises(ValueError, match="only supported for models with only full attention layers"):
        QuantizedCache("quanto", model.config)


def test_crop_is_refused_and_leaves_the_cache_intact(model: LinearLlama3ForCausalLM) -> None:
    """For either kind of first layer, and for a cache made by `generate`."""
    types = model.config.layer_types
    assert types is not None
    for layers in (types, types[::-1]):
        model = tiny_model("gla", layer_types=layers)
        x = tokens(1, 12)
        generated = model.generate(x[:, :6], max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        for cache in (model(x[:, :7]).past_key_values, generated.past_key_values):
            with pytest.raises(ValueError, match=r"cannot forget its last tokens, got crop\(-2\); keep copy.deepcopy"):
                cache.crop(-2)
        rest = model(x[:, 7:], past_key_values=model(x[:, :7]).past_key_values).logits
        cache = model(x[:, :7]).past_key_values
        with pytest.raises(ValueError, match="cannot forget"):
            cache.crop(-2)
        assert torch.equal(model(x[:, 7:], past_key_values=cache).logits, rest)


def test_a_cache_of_the_complete_prompt_is_refused(model: LinearLlama3ForCausalLM) -> None:
    """transformers would feed the prompt a second time."""
    x = tokens(2, 7)
    for given in (x, torch.cat([x, x[:, :1]], 1)):
        with pytest.raises(
            ValueError, match=rf"got a cache of {given.shape[1]} tokens for a prompt of 7; compute it from"
        ):
            generate(model, x, past_key_values=model(given, use_cache=True).past_key_values)
    cache = model(x[:, :-1], use_cache=True).past_key_values
    assert torch.equal(generate(model, x, past_key_values=cache), generate(model, x))


def test_caches_without_a_place_for_the_state_are_refused() -> None:
    pure, hybrid = tiny_model("gla", full_attention_interval=0), tiny_model("gla")
    x = tokens(1, 7)
    for cache in (DynamicCache(config=pure.config), StaticCache(config=pure.config, max_cache_len=9)):
        with pytest.raises(ValueError, match=f"needs a RecurrentCache, got {type(cache).__name__}"):
            pure(x, past_key_values=cache)
    with pytest.raises(ValueError, match=r"layer 0 is linear .* build it with DynamicCache\(config=model.config\)"):
        hybrid(x, past_key_values=DynamicCache())
    for model in (pure, hybrid):
        with pytest.raises(ValueError, match=r"must be a transformers Cache, got a tuple; .* or pass no cache"):
            model(x, past_key_values=((torch.zeros(1, 2, 3, 8),) * 2,) * 4)
    for implementation in ("quantized", "offloaded", "offloaded_static"):
        with pytest.raises(ValueError, match=f"got cache_implementation='{implementation}'; .* or give 'static'"):
            generate(pure, x, cache_implementation=implementation)
    assert torch.equal(generate(pure, x, past_key_values=RecurrentCache(pure.config)), greedy(pure, x, 8))
