"""The configuration: layer patterns, derived sizes, and errors for fields that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GPT2Config, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM, LinearLlama3Model
from tests.helpers.tiny import SIZES, tiny_config


@pytest.mark.parametrize(
    ("interval", "pattern"),
    [(4, "LLLSLLLS"), (2, "LSLSLSLS"), (1, "SSSSSSSS"), (0, "LLLLLLLL"), (None, "LLLLLLLL")],
)
def test_layers_follow_the_interval(interval: int | None, pattern: str) -> None:
    config = tiny_config(num_hidden_layers=8, full_attention_interval=interval)
    names = {"L": "linear_attention", "S": "full_attention"}
    assert config.layer_types == [names[letter] for letter in pattern]
    assert config.has_softmax_layers == ("S" in pattern)


def test_layer_types_take_precedence_over_the_interval() -> None:
    layer_types = ["full_attention", "linear_attention"]
    assert tiny_config(num_hidden_layers=2, layer_types=layer_types).layer_types == layer_types


def test_defaults_are_llama_3() -> None:
    config = LinearLlama3Config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (4096, 32, 8)
    assert config.rope_parameters is not None and config.rope_parameters["rope_theta"] == 500000.0
    assert (config.linear_num_key_value_heads, config.linear_key_head_dim, config.linear_value_head_dim) == (
        8,
        128,
        128,
    )


@pytest.mark.parametrize("mixer, key_dim", [("gla", 8), ("based", 16)])
def test_given_sizes_of_linear_layers_replace_the_defaults(mixer: str, key_dim: int) -> None:
    default = tiny_config(mixer)
    assert default.linear_sizes == (default.num_key_value_heads, key_dim, default.head_dim) == (2, key_dim, 8)
    names = ("linear_num_key_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    given = tiny_config(mixer, **dict(zip(names, (1, 4, 6), strict=True)))
    assert given.linear_sizes == (1, 4, 6)
    layer: Any = LinearLlama3Model(given).layers[0].self_attn
    assert [layer.k_proj.out_features, layer.v_proj.out_features] == [4, 6]


LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("scaling", [None, LLAMA3_SCALING, {"type": "linear", "factor": 2.0}], ids=str)
def test_old_rope_fields_are_accepted(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    """The table equals that of Llama with the same fields, also after reading a config.json."""
    old: dict[str, Any] = {"rope_theta": 10000.0, "rope_scaling": scaling}
    config = tiny_config(**old)
    assert config.rope_parameters is not None and config.rope_parameters["rope_theta"] == 10000.0
    assert config.rope_parameters["rope_type"] == (scaling or {}).get("rope_type", "linear" if scaling else "default")
    saved = {**config.to_dict(), **old}
    del saved["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    expected = LlamaRotaryEmbedding(LlamaConfig(**SIZES, **old)).inv_freq
    for each in (config, LinearLlama3Config.from_pretrained(tmp_path)):
        assert torch.equal(LinearLlama3Model(each).rotary_emb.get_buffer("inv_freq"), expected)


def test_common_attributes_can_be_given_and_set() -> None:
    common: dict[str, Any] = {
        "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 4, "vocab_size": 99, "use_cache": False,
        "output_hidden_states": True, "return_dict": False, "num_labels": 3, "tie_word_embeddings": True,
    }  # fmt: skip
    given, changed = tiny_config(**common), tiny_config()
    for name, value in common.items():
        setattr(changed, name, value)
        assert getattr(given, name) == getattr(changed, name) == value, name
    assert given.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_json_round_trip(tmp_path: Path) -> None:
    config = tiny_config("lightning", linear_value_head_dim=16, linear_use_rope=True, gate_bias_init=4.0)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LinearLlama3Config
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not any("parallel" in key for key in saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"linear_attention_type": "mamba"}, "linear_attention_type must be one of .*gla.*, got 'mamba'"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim must be at least 1, got 0"),
        ({"linear_feature_map": "cosine"}, "linear_feature_map must be one of .*silu.*, got 'cosine'"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3"),
        ({"linear_num_key_value_heads": 3}, "must be a multiple of linear_num_key_value_heads, got 4 and 3"),
        ({"hidden_size": 34}, "hidden_size must be a multiple of num_attention_heads, got 34 and 4"),
        ({"layer_types": ["full_attention"]}, "one entry for each of num_hidden_layers=4 layers, got 1"),
        ({"layer_types": ["full_attention"] * 3 + ["mlp"]}, "every entry of layer_types must be one of .*, got 'mlp'"),
        ({"full_attention_interval": -1}, "full_attention_interval must be 0 or more, got -1"),
        ({"linear_use_rope": True, "linear_key_head_dim": 4}, "must be head_dim, got 4 features .of 4. and 8"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_changes_of_a_saved_config_fit_together(tmp_path: Path) -> None:
    """transformers sets changes on the finished config, where layer_types would silently override the interval."""
    LinearLlama3Config(num_hidden_layers=4, full_attention_interval=4).save_pretrained(tmp_path)
    linear, full = "linear_attention", "full_attention"
    changed, unused = LinearLlama3Config.from_pretrained(
        tmp_path, full_attention_interval=2, other=1, return_unused_kwargs=True
    )
    assert changed.layer_types == [linear, full] * 2 and unused == {"other": 1}
    for layer_types, expected in ((None, [linear] * 4), ([full] * 4, [full] * 4)):
        changed = AutoConfig.from_pretrained(tmp_path, full_attention_interval=0, layer_types=layer_types)
        assert changed.layer_types == expected
    changed = LinearLlama3Config.from_pretrained(tmp_path, num_hidden_layers=8, layer_types=None)
    assert changed.layer_types == ([linear] * 3 + [full]) * 2
    with pytest.raises(ValueError, match="one entry for each of num_hidden_layers=8 layers, got 4"):
        LinearLlama3Config.from_pretrained(tmp_path, num_hidden_layers=8)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(StrictDataclassError, match="linear_output_gate"):
        tiny_config(linear_output_gate="yes")


@pytest.mark.parametrize("other", [LlamaConfig(vocab_size=8), GPT2Config(vocab_size=8)])
def test_a_config_of_another_model_is_refused(other: Any, tmp_path: Path) -> None:
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"must be 'linear_llama3', got '{other.model_type}'"):
        LinearLlama3ForCausalLM.from_pretrained(tmp_path)
