"""`torch.compile`: the decoding step is one graph, compiled once for all positions; so is a training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.modeling import CountingCache
from tests.modeling.test_generation import generate
from tests.modeling.tiny import MIXER_NAMES, gradients, tiny_model, tokens


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small_model(mixer: str, interval: int) -> LinearLlama3ForCausalLM:
    """A linear layer, and a softmax layer behind it where there is any: compiling takes long."""
    return tiny_model(mixer, full_attention_interval=interval, num_hidden_layers=interval or 1)


def make_cache(model: LinearLlama3ForCausalLM) -> Any:
    if model.config.has_softmax_layers:
        return StaticCache(config=model.config, max_cache_len=16)
    return CountingCache(model.config)


@pytest.mark.parametrize(
    ("mixer", "interval", "backend"),
    [*((mixer, 2, "aot_eager") for mixer in MIXER_NAMES), ("retention", 0, "aot_eager"), ("gla", 2, "inductor")],
)
@torch.no_grad()
def test_decoding_step(mixer: str, interval: int, backend: str) -> None:
    model, x = small_model(mixer, interval), tokens(2, 16)
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(model, backend=counter, fullgraph=True)
    cache = make_cache(model)
    logits = [model(x[:, :8], past_key_values=cache).logits]
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits += [step(x[:, i : i + 1], past_key_values=cache).logits for i in range(8, 16)]
    assert counter.frame_count == 1
    torch.testing.assert_close(torch.cat(logits, 1), model(x, use_cache=False).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("interval", [2, 0])
def test_generate_compiles_once(interval: int, padded: bool) -> None:
    """As on a GPU, where `generate` compiles on its own; another prompt of the same length compiles nothing."""
    model = small_model("gla", interval)
    settings = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    settings._compile_all_devices = True
    counters.clear()
    for seed in (1, 2):
        x = tokens(2, 6, seed=seed)
        mask = torch.ones_like(x)
        mask[0, : 2 * padded] = 0
        options = {"attention_mask": mask, "max_new_tokens": 6}
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = generate(model, x, cache_implementation="static", compile_config=settings, **options)
        assert torch.equal(out, generate(model, x, **options))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_training_step(mixer: str) -> None:
    model, x = small_model(mixer, 2).train(), tokens(2, 50)
    model(x, labels=x).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    torch.compile(model, backend=counter, fullgraph=True)(x, labels=x).loss.backward()
    assert counter.frame_count == 1
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-4 * float(expected[name].abs().max()))
