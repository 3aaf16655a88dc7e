"""Attention implementations of softmax layers, and precisions: the same model, up to rounding."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.modeling import inputs
from tests.helpers.generation import feed, generate
from tests.helpers.marks import each_attention_implementation
from tests.helpers.tiny import MIXER_NAMES, gradients, tiny_model, tokens

PADDED = torch.tensor([[0] * 4 + [1] * 11, [1] * 15])
PACKED = torch.tensor([[*range(5), *range(10)], [*range(12), *range(3)]])


@each_attention_implementation
@torch.no_grad()
def test_logits_of_all_backends_agree(implementation: str, stance: str) -> None:
    model, x = tiny_model(num_hidden_layers=2), tokens(2, 15)
    assert model.config._attn_implementation == "sdpa"

    def padded_and_packed() -> list[Tensor]:
        return [model(x, attention_mask=PADDED).logits[PADDED.bool()], model(x, position_ids=PACKED).logits]

    expected = padded_and_packed()
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    with torch.compiler.set_stance(stance):
        for got, want in zip(padded_and_packed(), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_generated_text_of_eager_and_sdpa_agrees() -> None:
    model, x = tiny_model(), tokens(2, 7)
    expected = generate(model, x)
    model.set_attn_implementation("eager")
    assert torch.equal(generate(model, x), expected)


def test_gradients_of_eager_and_sdpa_agree() -> None:
    model, x = tiny_model(), tokens(2, 15)
    labels, results = x.masked_fill(PADDED == 0, -100), {}
    labels[0, 4] = -100  # its predecessor is padding
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(x, labels=labels, attention_mask=PADDED).loss.backward()
        results[name] = gradients(model)
    for name, want in results["eager"].items():
        torch.testing.assert_close(results["sdpa"][name], want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_masks_are_made_once_per_layer_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that the caller prepared are used as they are."""
    makers = [Mock(wraps=make) for make in (inputs.create_causal_mask, inputs.create_recurrent_attention_mask)]
    monkeypatch.setattr(inputs, "create_causal_mask", makers[0])
    monkeypatch.setattr(inputs, "create_recurrent_attention_mask", makers[1])
    model, x = tiny_model(), tokens(2, 15)
    logits = model(x, attention_mask=PADDED).logits
    assert [make.call_count for make in makers] == [1, 1]
    embeds = model.get_input_embeddings()(x)
    masks = model.create_masks_for_generate(model.config, embeds, PADDED, None)
    assert masks.keys() == {"full_attention", "linear_attention"}
    for make in makers:
        make.reset_mock()
    assert torch.equal(model(x, attention_mask=masks).logits, logits)
    assert not any(make.called for make in makers)


@pytest.mark.parametrize("description", ["position_ids", "cu_seq_lens_q"])
def test_packing_reaches_the_attention_as_flash_attention_wants_it(description: str) -> None:
    seen: dict[str, Any] = {}

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    model, edges = tiny_model(), [0, 5, 15, 27, 30]
    model.set_attn_implementation("spy")
    given = {"position_ids": PACKED} if description == "position_ids" else {description: torch.tensor(edges)}
    model(tokens(2, 15), **given)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert seen[name].dtype == torch.int32 and seen[name].tolist() == edges
    assert seen["max_length_q"] == seen["max_length_k"] == 12


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
@torch.no_grad()
def test_decoding_in_low_precision(mixer: str, dtype: torch.dtype, autocast: bool) -> None:
    """The state stays float32 from step to step, and cached logits are uncached ones up to rounding."""
    model, x = tiny_model(mixer, initializer_range=0.05), tokens(2, 24)
    model = model if autocast else model.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        logits, cache = feed(model, x, [10, 1, 1, 12])
        uncached = model(x, use_cache=False).logits
    assert logits.dtype == dtype
    assert {cache.layers[i].recurrent_states[0].dtype for i in model.config.linear_layers} == {torch.float32}
    assert (logits.float() - uncached.float()).norm() < 0.02 * uncached.float().norm()


def test_flash_attention_that_is_not_installed_is_refused() -> None:
    model: LinearLlama3ForCausalLM = tiny_model()
    if torch.cuda.is_available():
        pytest.skip("may be installed here")
    with pytest.raises((ImportError, ValueError), match=r"[Ff]lash"):
        model.set_attn_implementation("flash_attention_2")
