"""Training: gradient checkpointing and caches, adapters on a frozen model, Trainer's label smoothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import linear_llama3.modeling.model
from linear_llama3.modeling.cache import new_cache
from tests.helpers.tiny import MIXER_NAMES, gradients, tiny_model, tokens


@pytest.mark.parametrize("interval", [2, 0])
def test_gradient_checkpointing_disables_the_cache_with_a_warning(
    interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(linear_llama3.modeling.model.logger, "warning_once", warnings.append)
    model, x = tiny_model("gla", full_attention_interval=interval).train(), tokens(2, 9)
    cache = model(x, use_cache=True).past_key_values
    assert cache.get_seq_length() == 9 and not warnings
    model.gradient_checkpointing_enable()
    assert model(x).past_key_values is None and not warnings
    assert model(x, use_cache=True).past_key_values is None
    assert len(warnings) == 1 and "incompatible with gradient checkpointing" in warnings[0]
    assert model.eval()(x, use_cache=True).past_key_values is not None
    model.train().gradient_checkpointing_disable()
    assert model(x, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("interval", [2, 1, 0])
def test_gradient_checkpointing_refuses_a_cache(interval: int) -> None:
    """Dropping the cache would lose the context; dropping an empty one would lose the context of the next pass."""
    model, x = tiny_model("gla", full_attention_interval=interval).train(), tokens(2, 9)
    filled = model(x[:, :5], use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    for cache in (filled, new_cache(model.config)):
        with pytest.raises(ValueError, match=rf"the cache has changed, got a {type(cache).__name__};"):
            model(x[:, 5:], past_key_values=cache, labels=x[:, 5:])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("interval", [2, 1, 0])
@torch.no_grad()
def test_a_cache_is_used_in_training_mode_without_gradients(interval: int, reentrant: bool) -> None:
    """Nothing is recomputed, so the cache is used, and `generate` returns the same as in evaluation mode."""
    model, x = tiny_model("gla", full_attention_interval=interval), tokens(2, 9)
    expected = model(x).logits[:, 5:]
    text = model.generate(x, max_new_tokens=6, do_sample=False)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    cache = model(x[:, :5], use_cache=True).past_key_values
    torch.testing.assert_close(model(x[:, 5:], past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(x, max_new_tokens=6, do_sample=False), text)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_an_adapter_in_a_frozen_model_has_its_gradient(mixer: str, reentrant: bool) -> None:
    """Only `q_proj` learns, as with LoRA; re-entrant checkpoints need inputs that require gradients."""
    model, x = tiny_model(mixer).train(), tokens(2, 19)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    model(x, labels=x).loss.backward()
    expected = gradients(model)
    assert len(expected) == 4
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(x, labels=x).loss.backward()
    assert gradients(model).keys() == expected.keys()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("counted", [False, True])
def test_label_smoothing(counted: bool, tmp_path: Path) -> None:
    """Trainer's smoother predicts the next token, as for transformers' own causal models."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, label_smoothing_factor=0.2, report_to=[])
    model, x = tiny_model(), tokens(2, 12)
    labels = x.clone()
    labels[0, :5] = -100
    log_p = model(x).logits[:, :-1].log_softmax(-1).flatten(0, 1)
    targets = labels[:, 1:].flatten()
    likelihood, uniform = log_p[targets >= 0], log_p[targets >= 0].mean(-1)
    likelihood = likelihood.gather(1, targets[targets >= 0, None])[:, 0]
    count = 50 if counted else len(likelihood)
    expected = -(0.8 * likelihood + 0.2 * uniform).sum() / count
    trainer = Trainer(model, arguments)
    got = trainer.compute_loss(model, {"input_ids": x, "labels": labels}, num_items_in_batch=50 if counted else None)
    torch.testing.assert_close(got, expected)


def test_the_loss_without_labels_is_zero_if_counted() -> None:
    """A mean would be nan."""
    model, x = tiny_model().train(), tokens(1, 6)
    labels = torch.full_like(x, -100)
    loss = model(x, labels=labels, num_items_in_batch=8).loss
    loss.backward()
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(model).values())
    torch.testing.assert_close(
        model(x, labels=x, num_items_in_batch=8).loss,
        F.cross_entropy(model(x).logits[0, :-1], x[0, 1:], reduction="sum") / 8,
    )


@pytest.mark.parametrize("interval", [2, 0])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_gradients_flow_back_through_a_cache(mixer: str, interval: int) -> None:
    """Three passes that continue from each other's cache have the gradients of one pass; a fourth has no gradients."""
    x, found = tokens(2, 12), []
    for pieces in ([12], [5, 1, 6]):
        model, cache, start = tiny_model(mixer, full_attention_interval=interval), None, 0
        losses = []
        for length in pieces:
            out = model(x[:, start : start + length], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + length
            losses.append(out.logits.log_softmax(-1)[..., 7].sum())
        torch.stack(losses).sum().backward()
        with torch.no_grad():
            after = model(tokens(2, 3), past_key_values=cache).logits
        found.append({**gradients(model), "after": after})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
