"""Caches and generation: tokens fed in pieces give the results of the complete sequence at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.generation import MODELS, feed, generate, greedy
from tests.helpers.tiny import VOCAB, tiny_model, tokens


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 1, 4], [7, 5]], ids=["one", "prefill-decode", "chunks"])
@pytest.mark.parametrize(("mixer", "interval"), MODELS)
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
    _, cache = feed(model, x, [6])
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    twice = model(x[1:].expand(2, -1)[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(twice, model(x).logits[1:, 6:].expand(2, -1, -1), rtol=1e-3, atol=1e-3)
    _, cache = feed(model, x, [6])
    if interval == 0:  # resetting a DynamicCache keeps the length of its softmax layers
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(x, past_key_values=cache).logits, model(x).logits)


@pytest.mark.parametrize(("mixer", "interval"), MODELS)
def test_greedy_text_equals_that_of_complete_forwards(mixer: str, interval: int) -> None:
    model = tiny_model(mixer, full_attention_interval=interval)
    x = tokens(2, 7)
    expected = greedy(model, x, 8)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"prefill_chunk_size": 1}):
        assert torch.equal(generate(model, x, **options), expected), options


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


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("interval", [2, 0])
def test_inputs_embeds(interval: int, static: bool) -> None:
    model = tiny_model("retention", full_attention_interval=interval)
    x = tokens(2, 7)
    embeds = model.get_input_embeddings()(x)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    expected = generate(model, x, attention_mask=mask)
    options: dict[str, Any] = {"attention_mask": mask, "cache_implementation": "static" if static else None}
    assert torch.equal(generate(model, x, inputs_embeds=embeds, **options), expected)
    options |= {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected[:, 7:])


@pytest.mark.parametrize("interval", [2, 0])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 2}], ids=str)
def test_a_row_alone_equals_the_row_in_a_batch(interval: int, options: dict[str, Any]) -> None:
    """Rows end at different tokens."""
    model = tiny_model("gla", full_attention_interval=interval)
    x = tokens(4, 6)
    end = greedy(model, x[:1], 8)[0, 9].item()
    together = generate(model, x, eos_token_id=end, **options)
    for row, ids in zip(together, x, strict=True):
        alone = generate(model, ids[None], eos_token_id=end, **options)[0]
        assert torch.equal(row[: len(alone)], alone)
        assert set(row[len(alone) :].tolist()) <= {0, end}  # beam search fills up with the end when padding is 0


def test_a_seed_fixes_the_samples() -> None:
    model, x = tiny_model("gla"), tokens(2, 6)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(generate(model, x, do_sample=True, num_return_sequences=2, temperature=2.0))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0][0], outputs[0][1])


def test_beam_search_finds_the_best_continuation() -> None:
    """With one beam for each first token, the result is the best of all pairs, found here by trying each."""
    model, x = tiny_model("gla", full_attention_interval=2), tokens(1, 6)
    pairs = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))
    with torch.no_grad():
        scores = model(torch.cat([x.expand(len(pairs), -1), pairs], 1), use_cache=False).logits.log_softmax(-1)
    total = scores[:, 5].gather(1, pairs[:, :1]) + scores[:, 6].gather(1, pairs[:, 1:])
    found = generate(model, x, num_beams=VOCAB, max_new_tokens=2)
    assert torch.equal(found[0, 6:], pairs[total.argmax()])


def test_all_softmax_models_can_be_assisted() -> None:
    """There is no state that could not be rolled back."""
    model, x = tiny_model(full_attention_interval=1), tokens(1, 7).repeat(1, 2)
    expected = greedy(model, x, 8)
    assert torch.equal(generate(model, x, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(generate(model, x, assistant_model=tiny_model(full_attention_interval=1, seed=1)), expected)
