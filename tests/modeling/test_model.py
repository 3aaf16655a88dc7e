"""The model's inputs and outputs: padding, loss, Llama's weights, checkpointing, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from linear_llama3 import LinearLlama3ForCausalLM, LinearLlama3Model
from linear_llama3.modeling import LinearAttention
from linear_llama3.sequence_parallel import SequenceParallelContext
from tests.helpers.marks import slow_unless
from tests.helpers.tiny import MIXER_NAMES, SIZES, VOCAB, gradients, tiny_config, tiny_model, tokens


def test_outputs_have_the_expected_types_and_shapes() -> None:
    model = tiny_model(attn_implementation="eager")
    x = tokens(2, 11)
    out = model(x, output_hidden_states=True, output_attentions=True)
    assert out.logits.shape == (2, 11, VOCAB)
    assert out.loss is None
    assert len(out.hidden_states) == 5
    assert len(out.attentions) == 2  # the softmax layers
    assert model(x, use_cache=False).past_key_values is None
    assert model.train()(x).past_key_values is None
    for got, want in zip(model(x, use_cache=False, return_dict=False), (out.logits,), strict=True):
        torch.testing.assert_close(got, want)


def test_ids_and_embeddings_agree_and_exclude_each_other() -> None:
    model = tiny_model()
    x = tokens(3, 11)
    logits = model(x).logits
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(x)).logits, logits)
    torch.testing.assert_close(model(x[1:2]).logits, logits[1:2], rtol=1e-4, atol=1e-5)
    for kwargs, got in (({}, "neither"), ({"input_ids": x, "inputs_embeds": torch.zeros(3, 11, 32)}, "both")):
        with pytest.raises(ValueError, match=f"exactly one of input_ids and inputs_embeds, got {got}"):
            model(**kwargs)
    with pytest.raises(ValueError, match=r"attention_mask \[B, T\] with 0 at padding, got \(3, 1, 11, 11\)"):
        model(x, attention_mask=torch.ones(3, 1, 11, 11))
    with pytest.raises(ValueError, match=r"attention_mask must cover all 11 tokens, got shape \(3, 1\)"):
        model(x, attention_mask=torch.ones(3, 1))
    with pytest.raises(ValueError, match="is_causal=False"):
        model(x, is_causal=False)


@pytest.mark.parametrize("interval", [2, 0])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_padded_rows_equal_rows_alone(mixer: str, interval: int) -> None:
    model = tiny_model(mixer, full_attention_interval=interval)
    x, pad = tokens(1, 13), torch.zeros(1, 6, dtype=torch.long)
    zeros, ones = torch.zeros(1, 6), torch.ones(1, 13)
    alone = model(x).logits
    left = model(torch.cat([pad, x], 1), attention_mask=torch.cat([zeros, ones], 1)).logits[:, 6:]
    torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-4)
    right = model(torch.cat([x, pad], 1), attention_mask=torch.cat([ones, zeros], 1)).logits[:, :13]
    torch.testing.assert_close(right, alone, rtol=1e-4, atol=1e-4)


def test_all_softmax_is_llama(tmp_path: Path) -> None:
    """Llama's weights load as they are: no missing key, and identical logits where every layer is softmax."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    fields = {**SIZES, "initializer_range": 0.3, "rms_norm_eps": 1e-5, "rope_parameters": rope}
    llama = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    llama.save_pretrained(tmp_path)
    config = tiny_config(full_attention_interval=1, rope_parameters=rope)
    model, info = LinearLlama3ForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x = tokens(2, 17)
    assert torch.equal(model(x).logits, llama(x).logits)

    config = tiny_config("gla", full_attention_interval=2, rope_parameters=rope)
    hybrid, info = LinearLlama3ForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    own = {
        "o_norm.weight",
        "decay_down_proj.weight",
        "decay_up_proj.weight",
        "decay_bias",
        "g_proj.weight",
    }
    assert info["missing_keys"] == {f"model.layers.{i}.self_attn.{name}" for i in (0, 2) for name in own}
    assert torch.equal(hybrid.model.layers[0].self_attn.q_proj.weight, llama.model.layers[0].self_attn.q_proj.weight)
    assert (hybrid.model.layers[0].self_attn.decay_bias == config.gate_bias_init).all()


def test_initial_decay_is_long_memory() -> None:
    layer = LinearLlama3Model(tiny_config("gla")).layers[0].self_attn
    assert isinstance(layer, LinearAttention)
    log_decay = layer._log_decay(torch.randn(1, 5, 32))
    assert log_decay is not None and (log_decay.exp() > 0.999).all()


@slow_unless(lambda mixer: mixer in ("gla", "rebased"), mixer=MIXER_NAMES)
def test_every_parameter_learns(mixer: str) -> None:
    torch.manual_seed(0)
    model = LinearLlama3ForCausalLM(tiny_config(mixer)).train()
    x = tokens(2, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, norms = [], []
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(x, labels=x).loss
        loss.backward()
        assert len(gradients(model)) == len(list(model.parameters()))
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        optimizer.step()
        losses.append(loss.item())
    assert all(g.abs().max() > 0 for g in gradients(model).values())
    assert losses[-1] < 0.1 * losses[0]
    assert norms[-1] < 0.1 * norms[0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("interval", [2, 0])
def test_gradient_checkpointing_gives_the_same_gradients(interval: int, reentrant: bool) -> None:
    model = tiny_model("gla", full_attention_interval=interval).train()
    x = tokens(2, 19)
    plain_loss = model(x, labels=x).loss
    plain_loss.backward()
    plain = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    out = model(x, labels=x, use_cache=True)
    assert out.past_key_values is None
    out.loss.backward()
    hook.remove()
    assert len(calls) == 2  # once forward, once recomputed
    assert torch.equal(out.loss, plain_loss)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=0, msg=name)
    assert gradients(model).keys() == plain.keys()


def test_the_loss_equals_the_cross_entropy() -> None:
    model = tiny_model()
    x = tokens(2, 12)
    labels = x.clone()
    labels[0, :7] = -100
    logits = model(x).logits
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=-100, reduction="sum")
    count = int((shifted != -100).sum())
    torch.testing.assert_close(model(x, labels=labels).loss, total / count)
    torch.testing.assert_close(model(x, labels=labels, num_items_in_batch=7).loss, total / 7)
    given = model(x, labels=labels, shift_labels=shifted.contiguous(), num_items_in_batch=torch.tensor(5)).loss
    torch.testing.assert_close(given, total / 5)


def test_trainer_knows_the_class_as_a_causal_model() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert "LinearLlama3ForCausalLM" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def test_logits_to_keep() -> None:
    model = tiny_model()
    x = tokens(2, 9)
    full = model(x).logits
    torch.testing.assert_close(model(x, logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(x, logits_to_keep=torch.tensor([1, 5])).logits, full[:, [1, 5]])
    rows = torch.tensor([[0, 3], [8, 2]])
    torch.testing.assert_close(model(x, logits_to_keep=rows).logits, full[torch.arange(2)[:, None], rows])
    mask = torch.rand(2, 9) > 0.5
    torch.testing.assert_close(model(x, logits_to_keep=mask).logits, full[mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_low_precision_is_close_to_float32(mixer: str, dtype: torch.dtype) -> None:
    model = tiny_model(mixer, linear_use_rope=mixer in ("basic", "lightning", "retention"), initializer_range=0.05)
    x = tokens(2, 15)
    exact = model(x).logits
    with torch.autocast("cpu", dtype=dtype):
        auto = model(x)
    cast = model.to(dtype)(x)
    for out in (auto, cast):
        assert (out.logits.float() - exact).norm() < 0.05 * exact.norm()
        assert out.past_key_values.layers[0].recurrent_states[0].dtype == torch.float32


def test_attention_implementations_agree() -> None:
    model = tiny_model()
    x, mask = tokens(2, 15), torch.tensor([[0] * 4 + [1] * 11, [1] * 15])
    logits = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        logits[name] = model(x, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=1e-4, atol=1e-4)


def test_foreign_context_parallelism_stays_refused() -> None:
    model = tiny_model()
    assert not model.supports_context_parallel
    model.model.sequence_parallel_context = SequenceParallelContext(None)
    assert model.supports_context_parallel and model.model.supports_context_parallel


@pytest.mark.parametrize("size", [80, 40])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_and_resizing(tied: bool, size: int) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    kept = min(size, VOCAB)
    before = model.lm_head.weight[:kept].clone()
    model.resize_token_embeddings(size)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.vocab_size == size
    assert torch.equal(model.lm_head.weight[:kept], before)
    assert model(tokens(1, 5) % kept).logits.shape[-1] == size


def test_all_tensors_of_layers_are_parameters_or_buffers() -> None:
    """A tensor that is neither parameter nor buffer would stay on the meta device."""
    for mixer in MIXER_NAMES:
        for module in tiny_model(mixer).modules():
            loose: list[Any] = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
            assert not loose
    assert isinstance(tiny_model().model.layers[0].self_attn, LinearAttention)
