"""Presets: names, sizes against formulas and published counts, and the tables on the model cards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.commands.presets import list_presets, model_size, table
from linear_llama3.modeling import presets
from tests.helpers.marks import slow_unless
from tests.helpers.tiny import MIXER_NAMES

CARDS = ["linear-llama3-1b", "linear-llama3-script", "linear-llama-3"]
VOCABULARY = 128256
# layers, hidden, FFN, query heads, kv heads (softmax), kv heads (linear), tied; from the sources that the cards name
SHAPES = {
    "linear-llama3-1b": (16, 2048, 8192, 16, 8, 16, False),
    "linear-llama3-script-0.3b": (12, 1024, 4096, 32, 8, 32, False),
    "linear-llama3-script-1b": (16, 2048, 8192, 32, 8, 32, False),
    "linear-llama3-script-8b": (32, 4096, 8192, 32, 8, 32, False),
    "linear-llama-3.2-1b": (16, 2048, 8192, 32, 8, 8, True),
    "linear-llama-3.2-3b": (28, 3072, 8192, 24, 8, 8, True),
    "linear-llama-3.1-8b": (32, 4096, 14336, 32, 8, 8, False),
}
PUBLISHED = {  # parameters of Meta's models on the Hub, and the factor of their rotary scaling
    "linear-llama-3.2-1b": (1_235_814_400, 32.0),
    "linear-llama-3.2-3b": (3_212_749_824, 32.0),
    "linear-llama-3.1-8b": (8_030_261_248, 8.0),
}
FEATURES = {"based": 1 + 16 + 16 * 17 // 2, "rebased": 16 * 17 // 2}  # products of 16 channels, up to second order


def expected(shape: str, mixer: str, interval: int) -> tuple[int, int, int]:
    """Return (parameters, bytes of states, bytes of K and V per token) by the formulas of the layers."""
    layers, hidden, ffn, heads, kv_heads, linear_kv_heads, tied = SHAPES[shape]
    dim = hidden // heads
    softmax_layers = layers // interval if interval else 0
    softmax = hidden * dim * (2 * heads + 2 * kv_heads)  # q, o; k, v
    key = 16 if mixer in FEATURES else dim
    linear = hidden * (key * (heads + linear_kv_heads) + dim * (2 * heads + linear_kv_heads))  # q, k; o, gate, v
    if mixer == "rebased":
        linear += 2 * 2 * key  # factor and shift of queries and of keys
    if mixer == "gla":
        linear += 16 * hidden + 16 * linear_kv_heads * dim + linear_kv_heads * dim  # low rank; bias
    linear += 0 if mixer in FEATURES else dim  # norm of a head's output
    columns = dim + (mixer in FEATURES)  # the values and their normalizer
    parameters = (
        (1 if tied else 2) * VOCABULARY * hidden
        + layers * (3 * hidden * ffn + 2 * hidden)
        + softmax_layers * softmax
        + (layers - softmax_layers) * linear
        + hidden
    )
    return (
        parameters,
        (layers - softmax_layers) * linear_kv_heads * FEATURES.get(mixer, key) * columns * 4,
        softmax_layers * 2 * kv_heads * dim * 2,
    )


def test_every_shape_is_checked() -> None:
    assert sorted(SHAPES) == presets.shapes()


@slow_unless(lambda shape, mixer: mixer == "gla" or shape == "linear-llama3-1b", shape=SHAPES, mixer=MIXER_NAMES)
def test_sizes_equal_the_formulas(shape: str, mixer: str) -> None:
    config = LinearLlama3Config.from_preset(f"{shape}-{mixer}-hybrid-1-4")
    assert model_size(config) == expected(shape, mixer, 4)
    assert config.vocab_size == VOCABULARY and config.linear_attention_type == mixer


def test_fields_other_than_sizes() -> None:
    """Initial scale, rotary base, lengths and Llama 3's tokens; Meta's shapes are compared completely below."""
    for name in SHAPES.keys() - PUBLISHED.keys():
        config = LinearLlama3Config.from_preset(name)
        longest = 16384 if name == "linear-llama3-1b" else 131072
        assert config.initializer_range == 0.008 and config.max_position_embeddings == longest, name
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}, name
        assert (config.rms_norm_eps, config.hidden_act) == (1e-5, "silu")
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (128000, 128001, None)


@pytest.mark.parametrize(("ratio", "interval"), [("pure", 0), ("hybrid-1-8", 8), ("hybrid-1-4", 4), ("hybrid-1-2", 2)])
def test_the_papers_ratios(ratio: str, interval: int) -> None:
    config = LinearLlama3Config.from_preset(f"linear-llama3-1b-gla-{ratio}")
    softmax = [layer for layer in range(16) if layer not in config.linear_layers]
    assert softmax == (list(range(interval - 1, 16, interval)) if interval else [])
    assert model_size(config) == expected("linear-llama3-1b", "gla", interval)


@pytest.mark.parametrize("name", PUBLISHED)
def test_softmax_in_all_layers_is_metas_llama(name: str) -> None:
    """Parameters by name and shape, their published count, and the rotary table."""
    parameters, factor = PUBLISHED[name]
    layers, hidden, ffn, heads, kv_heads, _, tied = SHAPES[name]
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    meta = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=131072, rms_norm_eps=1e-5,
        bos_token_id=128000, eos_token_id=128001, tie_word_embeddings=tied, rope_theta=500000.0, rope_scaling=scaling,
    )  # fmt: skip
    config = LinearLlama3Config.from_preset(name, full_attention_interval=1)
    with torch.device("meta"):
        ours, llama = LinearLlama3ForCausalLM(config), LlamaForCausalLM(meta)
    assert ours.num_parameters() == parameters
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in llama.state_dict().items()}
    same = set(meta.to_dict()) & set(config.to_dict()) - {"model_type"}
    assert {"rope_parameters", "head_dim", "initializer_range", "hidden_act"} <= same
    assert {k: config.to_dict()[k] for k in same} == {k: meta.to_dict()[k] for k in same}
    rotary: Any = type(ours.model.rotary_emb)
    assert torch.equal(rotary(config).inv_freq, rotary(meta).inv_freq)


def test_a_name_leaves_the_rest_to_the_shape() -> None:
    for name, mixer, interval in (
        ("linear-llama3-1b", "basic", 0),
        ("linear-llama3-1b-hybrid-1-2", "basic", 2),
        ("linear-llama-3.2-1b", "gla", 4),
        ("linear-llama-3.2-1b-lightning", "lightning", 4),
        ("linear-llama-3.2-1b-pure", "gla", 0),
    ):
        config = LinearLlama3Config.from_preset(name)
        assert (config.linear_attention_type, config.full_attention_interval) == (mixer, interval), name


def test_overrides_replace_the_fields_of_a_preset() -> None:
    config = LinearLlama3Config.from_preset(
        "linear-llama-3.2-1b-gla-hybrid-1-4", linear_attention_type="retention", num_hidden_layers=2, vocab_size=7,
        layer_types=["full_attention", "linear_attention"], num_labels=3,
    )  # fmt: skip
    assert (config.linear_attention_type, config.vocab_size, config.num_labels) == ("retention", 7, 3)
    assert config.linear_layers == [1] and config.num_attention_heads == 32


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "linear-llama-3.2-2b",
            {},
            r"got 'linear-llama-3\.2-2b'; the shapes are linear-llama-3\.1-8b, .*linear-llama3-script-8b, the mixers ",
        ),
        ("linear-llama-3.2-1b-mamba", {}, r"shape\[-mixer\]\[-pure or -hybrid-1-n\], got 'linear-llama-3\.2-1b-mamba'"),
        ("linear-llama-3.2-1b-hybrid-1-0", {}, "got 'linear-llama-3.2-1b-hybrid-1-0'"),
        ("llama-3.1-8b", {}, r"got 'llama-3\.1-8b'; the shapes are .*linear-llama-3\.1-8b"),  # a hybrid is not Llama
        ("linear-llama-3x2-1b", {}, "got 'linear-llama-3x2-1b'"),
        ("", {}, "got ''"),
        (
            "linear-llama-3.2-3b-gla-hybrid-1-8",
            {},
            "1/8 of 'linear-llama-3.2-3b-gla-hybrid-1-8' must be softmax, got 28 layers",
        ),
        ("linear-llama-3.2-1b", {"num_hidden_layers": 2}, "1/4 of 'linear-llama-3.2-1b' must be softmax, got 2 layers"),
        (
            "linear-llama-3.2-1b",
            {"linear_atention_type": "gla"},
            "fields of LinearLlama3Config, got 'linear_atention_type'",
        ),
        ("linear-llama-3.2-1b", {"mixer": "gla"}, "fields of LinearLlama3Config, got 'mixer'"),
        (
            "linear-llama-3.2-1b",
            {"linear_attention_type": "mamba"},
            "linear_attention_type must be one of .* got 'mamba'",
        ),
    ],
)
def test_unknown_names_and_fields_are_refused(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearLlama3Config.from_preset(name, **fields)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_preset_is_a_config_file(shape: str, tmp_path: Path) -> None:
    read = AutoConfig.from_pretrained(presets.FOLDER / f"{shape}.json")
    config = LinearLlama3Config.from_preset(shape)
    assert type(read) is LinearLlama3Config and read.to_diff_dict() == config.to_diff_dict()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).layer_types == config.layer_types


@slow_unless(lambda name: name != "linear-llama3-1b", name=CARDS)
def test_cards_have_the_rows_of_the_command(name: str) -> None:
    """The front matter is valid, and no published weights are claimed."""
    card = ModelCard.load(presets.FOLDER / f"{name}.md")
    assert card.data.library_name == "transformers" and "linear_llama3" in card.data.tags
    assert "**no weights are published here" in " ".join(card.text.split())
    rows = [row for row in card.text.splitlines() if row.startswith(tuple(f"| {shape}" for shape in SHAPES))]
    names = [re.split(r"[ |]+", row)[1] for row in rows]
    assert rows == table(names).splitlines()[2:]
    family = [preset for preset in list_presets() if preset.startswith(name)]
    assert family and set(family) <= set(names)
    assert all(LinearLlama3Config.from_preset(p) for p in re.findall(r'from_preset\("([^"]+)"', card.text))


def test_the_papers_numbers_are_called_the_papers() -> None:
    text = (presets.FOLDER / "linear-llama3-1b.md").read_text()
    reported = text.split("## Reported by the paper, not reproduced here\n")[1]
    assert text.count("2.892") == reported.count("2.892") > 0
