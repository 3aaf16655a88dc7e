"""Models that start from Llama weights on disk: the same model, or an error that names what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM, LinearLlama3Model
from tests.helpers.tiny import SIZES, tiny_config, tiny_model, tokens

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 70000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "rope base 10,000": {},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 128},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "own head_dim, eps and activation": {"head_dim": 16, "rms_norm_eps": 1e-3, "hidden_act": "gelu"},
    "multi-head": {"num_key_value_heads": None, "vocab_size": 70, "intermediate_size": 40},
}


def save_llama(folder: Path, **fields: Any) -> LlamaForCausalLM:
    """Save a Llama with random weights and biases."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**{**SIZES, "initializer_range": 0.3, **fields})).eval()
    for name, parameter in llama.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    llama.save_pretrained(folder)
    return llama


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_all_softmax_is_llama(tmp_path: Path, fields: dict[str, Any]) -> None:
    llama, x = save_llama(tmp_path, **fields), tokens(2, 29)
    for source in (tmp_path, str(tmp_path), llama.config, LlamaConfig.from_pretrained(tmp_path)):
        config = LinearLlama3Config.from_llama(source, full_attention_interval=1)
        model, info = LinearLlama3ForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(model(x).logits, llama(x).logits)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == llama.config.tie_word_embeddings


def test_a_hybrid_keeps_all_fields_and_weights(tmp_path: Path) -> None:
    fields = {
        "dtype": "bfloat16", "bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": None, "use_cache": False,
        "attention_dropout": 0.25, "max_position_embeddings": 99, "initializer_range": 0.05, "num_labels": 3,
    }  # fmt: skip
    llama = LlamaConfig(**{**SIZES, **fields, "rope_parameters": LLAMA3_ROPE})
    llama.save_pretrained(tmp_path)
    for source in (llama, tmp_path):
        config = LinearLlama3Config.from_llama(source, linear_attention_type="gla", full_attention_interval=2)
        for name in [*SIZES, *fields, "rope_parameters", "id2label"]:
            assert getattr(config, name) == getattr(llama, name), name
        assert config.model_type == "linear_llama3" and config.linear_layers == [0, 2]
    assert config.dtype == torch.bfloat16 and config.architectures is None
    config.save_pretrained(tmp_path / "ours")
    assert AutoConfig.from_pretrained(tmp_path / "ours").rope_parameters == LLAMA3_ROPE


def test_old_rope_fields_in_the_file_are_read(tmp_path: Path) -> None:
    """Checkpoints before transformers 5 have rope_theta and rope_scaling."""
    llama = save_llama(tmp_path, rope_parameters=LLAMA3_ROPE)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["rope_theta"] = saved["rope_parameters"].pop("rope_theta")
    saved["rope_scaling"] = saved.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = LinearLlama3Config.from_llama(tmp_path, full_attention_interval=1)
    model = LinearLlama3ForCausalLM.from_pretrained(tmp_path, config=config)
    assert torch.equal(model(tokens(1, 29)).logits, llama(tokens(1, 29)).logits)


@pytest.mark.parametrize(
    ("ours", "difference"),
    [
        (
            {"rope_parameters": None},
            "rope_parameters={.*500000.0.*}, the checkpoint {.*70000.0",
        ),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False, the checkpoint True"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2, the checkpoint 4"),
        ({"hidden_size": 64}, "hidden_size=64, the checkpoint 32; head_dim=16, the checkpoint 8"),
        ({"vocab_size": 62}, "vocab_size=62, the checkpoint 61"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05, the checkpoint 1e-06"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', the checkpoint 'silu'"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias=True, the checkpoint False; mlp_bias=True"),
    ],
)
def test_a_config_that_contradicts_llama_is_refused(tmp_path: Path, ours: dict[str, Any], difference: str) -> None:
    same: dict[str, Any] = {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
    save_llama(tmp_path, **same)
    with pytest.raises(ValueError, match=rf"it has {difference}.*from_llama\('{tmp_path}', \.\.\.\)"):
        LinearLlama3ForCausalLM.from_pretrained(tmp_path, config=tiny_config(**{**same, **ours}))
    LinearLlama3ForCausalLM.from_pretrained(tmp_path, config=tiny_config(**same))


@pytest.mark.parametrize(
    "ours",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9e4}}, {"full_attention_interval": 4},
        {"linear_attention_type": "basic"}, {"linear_feature_map": "silu"}, {"linear_use_rope": True},
        {"linear_output_norm": False}, {"linear_num_key_value_heads": 4},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_contradicts_our_checkpoint_is_refused(tmp_path: Path, ours: dict[str, Any]) -> None:
    model = tiny_model("gla")
    model.save_pretrained(tmp_path)
    spelled_out = tiny_config("gla", linear_feature_map="identity", linear_use_rope=False, linear_output_norm=True)
    same = LinearLlama3ForCausalLM.from_pretrained(tmp_path, config=spelled_out)
    assert torch.equal(same(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    with pytest.raises(ValueError, match=rf"contradicts .*from_pretrained\('{tmp_path}', \.\.\.\)"):
        LinearLlama3ForCausalLM.from_pretrained(tmp_path, config=tiny_config(**{"mixer": "gla", **ours}))


def test_deliberate_changes_are_accepted(tmp_path: Path) -> None:
    """The rotary base may differ from that of the weights if it is given explicitly, in each possible way."""
    save_llama(tmp_path / "llama", rope_parameters=LLAMA3_ROPE)
    longer = {"rope_type": "default", "rope_theta": 5e6}
    config = LinearLlama3Config.from_llama(tmp_path / "llama", full_attention_interval=1, rope_parameters=longer)
    model = LinearLlama3ForCausalLM.from_pretrained(tmp_path / "llama", config=config)
    expected = LlamaForCausalLM.from_pretrained(
        tmp_path / "llama", config=LlamaConfig.from_pretrained(tmp_path / "llama", rope_parameters=longer)
    )
    x = tokens(1, 29)
    assert torch.equal(model(x).logits, expected(x).logits)

    ours = tmp_path / "ours"
    kept = LinearLlama3Config.from_llama(tmp_path / "llama", full_attention_interval=1)
    LinearLlama3ForCausalLM.from_pretrained(tmp_path / "llama", config=kept).save_pretrained(ours)
    by_config = LinearLlama3Config.from_pretrained(ours, rope_parameters=longer)
    changed_later = AutoConfig.from_pretrained(f"{ours}/")
    changed_later.rope_parameters = longer
    for loaded in (
        LinearLlama3ForCausalLM.from_pretrained(ours, rope_parameters=longer),
        LinearLlama3ForCausalLM.from_pretrained(ours, config=by_config),
        AutoModelForCausalLM.from_pretrained(ours, config=changed_later),
        AutoModelForCausalLM.from_pretrained(ours, rope_parameters=longer),
    ):
        assert torch.equal(loaded(x).logits, expected(x).logits)


def test_a_config_of_another_class_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path)
    message = r"must be a LinearLlama3Config, got a LlamaConfig; .*LinearLlama3Config.from_llama\(config"
    for make in (LinearLlama3ForCausalLM, LinearLlama3Model):
        with pytest.raises(ValueError, match=message):
            make(LlamaConfig(**SIZES))
        with pytest.raises(ValueError, match=message):
            make.from_pretrained(tmp_path, config=LlamaConfig.from_pretrained(tmp_path))


def test_llama_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    """The message contains a call that works."""
    llama = save_llama(tmp_path)
    with pytest.raises(ValueError, match=r"LinearLlama3Config\(\) alone describes a model of 8.4 billion") as error:
        LinearLlama3ForCausalLM.from_pretrained(tmp_path)
    call = str(error.value).split("write ")[1].split(". ")[0]
    names = {"LinearLlama3ForCausalLM": LinearLlama3ForCausalLM, "LinearLlama3Config": LinearLlama3Config}
    model = eval(call, {**names, "name": tmp_path})
    assert model.config.linear_attention_type == "gla"
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, llama.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize("other", [MistralConfig(**SIZES), LinearLlama3Config(**SIZES)])
def test_other_architectures_are_refused(tmp_path: Path, other: Any) -> None:
    other.save_pretrained(tmp_path)
    for source in (other, tmp_path):
        with pytest.raises(ValueError, match=rf"of a Llama model \(model_type 'llama'\), got '{other.model_type}'"):
            LinearLlama3Config.from_llama(source)
    if other.model_type == "mistral":
        with pytest.raises(ValueError, match="got model_type 'mistral'"):
            LinearLlama3ForCausalLM.from_pretrained(tmp_path, config=tiny_config())


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="from_llama takes the fields of LinearLlama3Config, got 'rope_theta'"):
        LinearLlama3Config.from_llama(LlamaConfig(**SIZES), rope_theta=1e6)


def test_the_default_is_large() -> None:
    with torch.device("meta"):
        assert round(LinearLlama3ForCausalLM(LinearLlama3Config()).num_parameters() / 1e9, 1) == 8.4
    assert "8.4 billion parameters" in (LinearLlama3Config.__doc__ or "")
