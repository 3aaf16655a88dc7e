"""The name of the cache, and checks for changes in the releases of other libraries."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, LlamaForCausalLM, PreTrainedModel, Trainer

import linear_llama3.modeling as modeling
from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.modeling import releases
from linear_llama3.modeling.cache import new_cache
from linear_llama3.modeling.releases import CACHE_NAME, CHUNKS_CACHED_TOKENS, check_hooks, warn_untested
from linear_llama3.trainer import LinearLlama3Trainer
from linear_llama3.trainer.hooks import TRAINER_HOOKS, check_trainer
from tests.helpers.tiny import tiny_model

OTHER_NAME = {"cache": "cache_params", "past_key_values": "cache"}[CACHE_NAME]  # which the release does not use
PROMPT = torch.arange(1, 12).view(1, -1)
MIXINS = LinearLlama3Trainer.__mro__[1:-2]  # the last two are Trainer and object


def test_the_name_of_the_cache_is_llamas() -> None:
    assert CACHE_NAME in inspect.signature(LlamaForCausalLM.forward).parameters
    assert CACHE_NAME in inspect.signature(modeling.LinearLlama3ForCausalLM.forward).parameters


@pytest.mark.parametrize("interval", [2, 0, 1], ids=["hybrid", "linear", "softmax"])
@torch.no_grad()
def test_a_cache_under_the_releases_name_continues_a_prompt(interval: int) -> None:
    model = tiny_model(full_attention_interval=interval).double()
    complete = model(PROMPT, use_cache=False).logits
    first = model(PROMPT[:, :7], use_cache=True)
    rest = model(PROMPT[:, 7:], **{CACHE_NAME: first[CACHE_NAME]})
    torch.testing.assert_close(rest.logits, complete[:, 7:], atol=1e-10, rtol=0)
    assert isinstance(first[CACHE_NAME], Cache) and rest[CACHE_NAME] is first[CACHE_NAME]


@pytest.mark.parametrize("interval", [2, 0, 1], ids=["hybrid", "linear", "softmax"])
@torch.no_grad()
def test_a_cache_under_another_name_is_refused(interval: int) -> None:
    model = tiny_model(full_attention_interval=interval)
    cache = new_cache(model.config)
    for target in (model, model.model):
        with pytest.raises(ValueError, match=f"calls the cache {CACHE_NAME}, got {OTHER_NAME}"):
            target(PROMPT, **{OTHER_NAME: cache})
        with pytest.raises(ValueError, match="got cache and past_key_values"):
            target(PROMPT, cache=cache, past_key_values=cache)
    if CACHE_NAME == "past_key_values":  # since 5.24, `generate` itself translates cache_params
        with pytest.raises(ValueError, match="cache"):
            model.generate(PROMPT, max_new_tokens=2, cache=cache)


@pytest.mark.skipif(CACHE_NAME != "cache", reason="the old name is this release's own")
@torch.no_grad()
def test_the_old_name_is_still_accepted() -> None:
    model = tiny_model(full_attention_interval=2).double()
    complete = model(PROMPT, use_cache=False).logits
    cache = model(PROMPT[:, :7], use_cache=True).past_key_values
    torch.testing.assert_close(model(PROMPT[:, 7:], past_key_values=cache).logits, complete[:, 7:], atol=1e-10, rtol=0)


def generate(model: LinearLlama3ForCausalLM, ids: Tensor, new: int, **options: Any) -> Any:
    return model.generate(
        ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True,
        **options,
    )  # fmt: skip


def assert_logits_without_a_cache(model: LinearLlama3ForCausalLM, output: Any) -> None:
    """Compare the logits of every step with one forward pass over the complete sequence.

    Tokens alone would not do: a state that is wrong can still have the right token as its most likely one.
    """
    steps = torch.stack(output.logits, dim=1)  # [B, new tokens, vocab], float32
    complete = model(output.sequences, use_cache=False).logits[:, -steps.shape[1] - 1 : -1]
    torch.testing.assert_close(steps, complete.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interval", [2, 0, 1], ids=["hybrid", "linear", "softmax"])
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
    ids=["greedy", "static", "chunked"],
)
@torch.no_grad()
def test_generation_equals_a_forward_pass_without_a_cache(interval: int, options: dict[str, Any]) -> None:
    model = tiny_model(full_attention_interval=interval).double()
    assert_logits_without_a_cache(model, generate(model, PROMPT, 8, **options))


@pytest.mark.parametrize("interval", [2, 0, 1], ids=["hybrid", "linear", "softmax"])
@torch.no_grad()
def test_beams_equal_beams_without_a_cache(interval: int) -> None:
    model = tiny_model(full_attention_interval=interval).double()
    cached, uncached = (generate(model, PROMPT, 8, num_beams=3, use_cache=use_cache) for use_cache in (True, False))
    assert cached.sequences.tolist() == uncached.sequences.tolist()
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_continued_prompt_of_linear_layers_is_counted_once() -> None:
    model = tiny_model(full_attention_interval=0).double()
    first = generate(model, PROMPT, 4)
    again = generate(model, first.sequences, 5, **{CACHE_NAME: first[CACHE_NAME]})
    assert_logits_without_a_cache(model, again)


@pytest.mark.parametrize("interval", [2, 0, 1], ids=["hybrid", "linear", "softmax"])
@torch.no_grad()
def test_a_chunked_prefill_after_a_cache_is_right_or_refused(interval: int) -> None:
    model = tiny_model(full_attention_interval=interval)
    expected = model.generate(PROMPT, use_cache=False, max_new_tokens=8, do_sample=False)
    options = {CACHE_NAME: model(PROMPT[:, :5], use_cache=True)[CACHE_NAME], "prefill_chunk_size": 2}
    if CHUNKS_CACHED_TOKENS:
        with pytest.raises(ValueError, match="counts cached tokens twice, got prefill_chunk_size=2 with a cache of 5"):
            model.generate(PROMPT, max_new_tokens=8, **options)
    else:
        assert model.generate(PROMPT, max_new_tokens=8, do_sample=False, **options).tolist() == expected.tolist()


class _Base:
    attribute: Any  # not a name that the class has

    def hook(self, inputs: Any, count: Any) -> None: ...

    def user(self) -> Any:
        return self.attribute


def test_check_hooks_accepts_the_expected_interface() -> None:
    check_hooks(_Base, {"hook": ("inputs",), "user": ()}, ("attribute",))


@pytest.mark.parametrize(
    "hooks, attributes, message",
    [
        ({"gone": ()}, (), "no method gone"),
        ({"hook": ("batch",)}, (), r"hook\(inputs, count\) instead of hook\(batch, \.\.\.\)"),
        ({"hook": ("inputs", "count", "more")}, (), r"hook\(inputs, count\)"),
        ({}, ("_vanished",), "no _vanished"),
    ],
)
def test_check_hooks_names_what_changed(
    hooks: dict[str, tuple[str, ...]], attributes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ImportError, match=message):
        check_hooks(_Base, hooks, attributes)


def test_a_trainer_with_another_hook_is_refused() -> None:
    class Renamed(Trainer):
        def _prepare_context_parallel_inputs(self, batch: Any) -> None: ...

    check_trainer(LinearLlama3Trainer)
    with pytest.raises(ImportError, match=r"_prepare_context_parallel_inputs\(batch\)"):
        check_trainer(type("Mine", (*MIXINS, Renamed), {}))


def test_a_trainer_that_passes_keywords_on_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Users(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, **kwargs)

        def log(self, logs: Any, *args: Any, **kwargs: Any) -> None:
            super().log(logs, *args, **kwargs)

    Mine = type("Mine", (*MIXINS, Users), {})
    check_trainer(Mine)
    monkeypatch.setattr(Users, "_track_num_input_tokens", lambda self, batch, **kwargs: None)
    with pytest.raises(ImportError, match=r"_track_num_input_tokens\(batch\)"):
        check_trainer(Mine)


@pytest.mark.parametrize(
    "ours, theirs, known",
    [
        (LinearLlama3Trainer, Trainer, set(TRAINER_HOOKS)),
        (modeling.LinearLlama3ForCausalLM, GenerationMixin, releases.GENERATION_HOOKS.keys()),
        (modeling.LinearLlama3ForCausalLM, PreTrainedModel, releases.MODEL_HOOKS.keys()),
    ],
    ids=["trainer", "generation", "model"],
)
def test_every_private_method_that_is_overridden_is_checked(ours: type, theirs: type, known: Collection[str]) -> None:
    own = [c for c in ours.__mro__ if c.__module__.startswith("linear_llama3.")]
    overridden = {name for c in own for name in vars(c) if name.startswith("_") and not name.startswith("__")}
    private = {name for name in overridden if inspect.isfunction(getattr(theirs, name, None))}
    assert private and private <= set(known)


@pytest.mark.parametrize("installed, warns", [("5.17.0", False), ("5.24.9", False), ("5.16.1", True), ("5.99.0", True)])
def test_releases_outside_of_the_tested_range_warn_by_name(
    installed: str, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(releases.metadata, "requires", lambda name: ["numpy>=1.26", "transformers>=5.17,<5.25"])
    monkeypatch.setattr(releases.metadata, "version", lambda name: installed)
    monkeypatch.setattr(releases.logger, "warning_once", warnings.append)
    warn_untested("transformers")
    assert [f"found {installed}" in text and "transformers" in text for text in warnings] == [True] * warns
