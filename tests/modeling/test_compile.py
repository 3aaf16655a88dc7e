"""`torch.compile`: a decoding step is one graph, compiled once for all positions; so is a training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.modeling import RecurrentCache
from tests.helpers.generation import generate
from tests.helpers.marks import needs_cxx, slow_unless
from tests.helpers.tiny import MIXER_NAMES, gradients, tiny_model, tokens


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small_model(mixer: str, interval: int) -> LinearLlama3ForCausalLM:
    """Return a model with one layer of each kind: compiling takes long."""
    return tiny_model(mixer, full_attention_interval=interval, num_hidden_layers=interval or 1)


def make_cache(model: LinearLlama3ForCausalLM) -> Any:
    if model.config.has_softmax_layers:
        return StaticCache(config=model.config, max_cache_len=16)
    return RecurrentCache(model.config)


@pytest.mark.parametrize(
    ("mixer", "interval", "backend"),
    [
        ("gla", 2, "aot_eager"),
        ("retention", 0, "aot_eager"),
        *(pytest.param(mixer, 2, "aot_eager", marks=pytest.mark.slow) for mixer in MIXER_NAMES if mixer != "gla"),
        pytest.param("gla", 2, "inductor", marks=[needs_cxx, pytest.mark.slow]),
    ],
)
@torch.no_grad()
def test_decoding_step_is_one_graph_for_all_positions(mixer: str, interval: int, backend: str) -> None:
    model, x = small_model(mixer, interval), tokens(2, 16)
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(model, backend=counter, fullgraph=True)
    cache = make_cache(model)
    logits = [model(x[:, :8], past_key_values=cache).logits]
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits += [step(x[:, i : i + 1], past_key_values=cache).logits for i in range(8, 16)]
    assert counter.frame_count == 1
    torch.testing.assert_close(torch.cat(logits, 1), model(x, use_cache=False).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("interval", "padding", "prefill_chunk_size", "graphs"),
    [
        (2, 0, None, 1),
        (0, 2, None, 1),
        pytest.param(2, 2, 4, 3, marks=pytest.mark.slow),
        pytest.param(0, 0, 4, 3, marks=pytest.mark.slow),
    ],
)
def test_generate_compiles_once(interval: int, padding: int, prefill_chunk_size: int | None, graphs: int) -> None:
    """`generate` compiles the decoding step, and the first and the later chunks of a chunked prefill, as it does on a
    GPU. A second prompt compiles nothing."""
    model = small_model("gla", interval)
    assert model._can_compile_fullgraph
    settings = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    settings._compile_all_devices = True
    counters.clear()
    for seed in (1, 2):
        x = tokens(2, 12, seed=seed)
        mask = torch.ones_like(x)
        mask[0, :padding] = 0
        expected = generate(model, x, attention_mask=mask, max_new_tokens=5)
        out = generate(
            model, x, attention_mask=mask, max_new_tokens=5, prefill_chunk_size=prefill_chunk_size,
            cache_implementation="static", compile_config=settings,
        )  # fmt: skip
        assert torch.equal(out, expected)
        assert counters["stats"]["unique_graphs"] == graphs


@slow_unless(lambda mixer: mixer == "gla", mixer=MIXER_NAMES)
def test_training_step_is_one_graph(mixer: str) -> None:
    model, x = small_model(mixer, 2).train(), tokens(2, 50)
    model(x, labels=x).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    torch.compile(model, backend=counter, fullgraph=True)(x, labels=x).loss.backward()
    assert counter.frame_count == 1
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-4 * float(expected[name].abs().max()))
