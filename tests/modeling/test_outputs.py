"""Outputs of a forward pass and of `generate` in addition to the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linear_llama3 import LinearLlama3ForCausalLM
from tests.helpers.generation import generate
from tests.helpers.tiny import VOCAB, tiny_model, tokens


def layer_outputs(model: LinearLlama3ForCausalLM, x: Tensor) -> list[Tensor]:
    """Return the embeddings and the output of every layer."""
    outputs = [model.get_input_embeddings()(x)]
    hooks = [layer.register_forward_hook(lambda *args: outputs.append(args[-1])) for layer in model.model.layers]
    model(x, use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("interval", [2, 1, 0])
@torch.no_grad()
def test_hidden_states_are_the_outputs_of_all_layers(interval: int) -> None:
    model, x = tiny_model(full_attention_interval=interval), tokens(2, 11)
    expected = layer_outputs(model, x)
    expected[-1] = model.model.norm(expected[-1])
    for returned in (model(x, output_hidden_states=True), model.model(x, output_hidden_states=True)):
        assert len(returned.hidden_states) == model.config.num_hidden_layers + 1
        for got, want in zip(returned.hidden_states, expected, strict=True):
            assert torch.equal(got, want)
    assert model(x).hidden_states is None


@pytest.mark.parametrize(("interval", "softmax_layers"), [(2, 2), (1, 4), (0, 0)])
@torch.no_grad()
def test_attentions_are_those_of_the_softmax_layers(interval: int, softmax_layers: int) -> None:
    model, x = tiny_model(full_attention_interval=interval, attn_implementation="eager"), tokens(2, 11)
    attentions = model(x, output_attentions=True).attentions
    assert len(attentions) == softmax_layers
    for weights in attentions:
        assert weights.shape == (2, 4, 11, 11)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 11))
        assert (weights.triu(1) == 0).all()
    assert model(x).attentions is None


@torch.no_grad()
def test_tuples_equal_output_classes() -> None:
    model, x = tiny_model(attn_implementation="eager"), tokens(2, 11)
    options: dict[str, Any] = {"labels": x, "output_hidden_states": True, "output_attentions": True}
    named = model(x, **options)
    loss, logits, cache, hidden_states, attentions = model(x, **options, return_dict=False)
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
    assert cache.get_seq_length() == 11
    for got, want in zip((*hidden_states, *attentions), (*named.hidden_states, *named.attentions), strict=True):
        assert torch.equal(got, want)
    assert [type(x) for x in model(x, use_cache=False, return_dict=False)] == [torch.Tensor]
    model.config.return_dict = False
    assert torch.equal(model(x, use_cache=False)[0], logits)


@pytest.mark.parametrize("interval", [2, 0])
def test_generate_returns_all_steps(interval: int) -> None:
    model = tiny_model(full_attention_interval=interval, attn_implementation="eager")
    out = generate(
        model, tokens(2, 7), max_new_tokens=3, return_dict_in_generate=True, output_logits=True,
        output_hidden_states=True, output_attentions=True,
    )  # fmt: skip
    assert [x.shape for x in out.logits] == [(2, VOCAB)] * 3
    assert [[x.shape[1] for x in step] for step in out.hidden_states] == [[7] * 5, [1] * 5, [1] * 5]
    expected: list[list[int]] = [[7, 7], [8, 8], [9, 9]] if interval else [[], [], []]  # keys that a query sees
    assert [[x.shape[-1] for x in step] for step in out.attentions] == expected
    assert out.past_key_values.get_seq_length() == 9
