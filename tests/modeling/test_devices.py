"""Models on the meta device, offloaded, copied and resized."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from torch import nn
from transformers import AutoModelForCausalLM

from linear_llama3 import LinearLlama3ForCausalLM, LinearLlama3Model
from linear_llama3.modeling import RecurrentCache
from linear_llama3.modeling.cache import StateCache
from tests.helpers.generation import feed, generate
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import MIXER_NAMES, tiny_config, tiny_model, tokens

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_an_empty_checkpoint_is_initialized_like_a_new_model(mixer: str, tmp_path: Path) -> None:
    """Missing constants equal those of a new model; other parameters have its standard deviation."""
    fields: dict[str, Any] = {"rope_parameters": LLAMA3_ROPE, "initializer_range": 0.3, "hidden_size": 64}
    model = tiny_model(mixer, **fields)
    model.save_pretrained(tmp_path, state_dict={"model.norm.weight": model.model.norm.weight})
    loaded, info = LinearLlama3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == len(list(model.parameters())) - 1
    buffers = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    parameters = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.std() == 0:
            assert torch.equal(parameters[name], parameter), name
        else:
            assert abs(parameters[name].std() / 0.3 - 1) < 0.15, name
    assert (parameters["model.embed_tokens.weight"][model.config.pad_token_id] == 0).all()


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_building_on_the_meta_device(mixer: str) -> None:
    with torch.device("meta"):
        model = LinearLlama3ForCausalLM(tiny_config(mixer))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert {x.device.type for x in tensors.values()} == {"meta"}
    assert model.num_parameters() == tiny_model(mixer).num_parameters()


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_device_map_auto(mixer: str, tmp_path: Path) -> None:
    model, x = tiny_model(mixer), tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = LinearLlama3ForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert torch.equal(generate(loaded, x), generate(model, x))


@slow_unless(
    lambda way, mixer: mixer in ("gla", "retention"),
    way=["cpu_offload", "dispatch_model", "from_pretrained"],
    mixer=MIXER_NAMES,
)
def test_offloaded_weights_give_the_same_text(way: str, mixer: str, tmp_path: Path) -> None:
    """Weights are loaded when a layer runs; a decoder layer is never split."""
    model, x = tiny_model(mixer), tokens(2, 9)
    expected = model(x).logits, generate(model, x)
    size = sum(parameter.nbytes for parameter in model.parameters())
    device_map = infer_auto_device_map(
        model, {"cpu": size * 2 // 3, "disk": 10 * size}, no_split_module_classes=model._no_split_modules
    )
    assert {name.count(".") for name in device_map if "layers" in name} == {2}
    if way == "cpu_offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif way == "dispatch_model":
        dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path))
    else:
        model.save_pretrained(tmp_path / "model")
        model = LinearLlama3ForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "weights")
        )
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(x).logits, expected[0])
    assert torch.equal(generate(model, x), expected[1])


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_a_deep_copy_is_independent(mixer: str) -> None:
    model, x = tiny_model(mixer), tokens(1, 9)
    expected = model(x).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(twin(x).logits, expected)


@pytest.mark.parametrize("interval", [2, 0])
@torch.no_grad()
def test_a_copied_cache_is_a_point_to_return_to(interval: int) -> None:
    model, x = tiny_model("gla", full_attention_interval=interval), tokens(1, 12)
    _, cache = feed(model, x, [7])
    twin = copy.deepcopy(cache)
    assert type(twin) is (StateCache if interval else RecurrentCache)
    model(tokens(1, 3, seed=5), past_key_values=cache)
    torch.testing.assert_close(
        model(x[:, 7:], past_key_values=twin).logits, model(x).logits[:, 7:], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_can_be_set_tied_resized_and_saved(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    assert model.get_input_embeddings() is model.model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    embeddings = nn.Embedding(61, 32)
    model.set_input_embeddings(embeddings)
    assert model.model.embed_tokens is embeddings
    model.tie_weights()
    assert (model.lm_head.weight is embeddings.weight) == tied
    head = nn.Linear(32, 61, bias=False)
    model.set_output_embeddings(head)
    assert model.lm_head is head
    model.tie_weights()
    for size in (80, 40):
        model.resize_token_embeddings(size)
        model.save_pretrained(tmp_path)
        loaded = LinearLlama3ForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.vocab_size == loaded.vocab_size == size
        assert loaded.model.embed_tokens.weight.shape == loaded.lm_head.weight.shape == (size, 32)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert torch.equal(loaded(tokens(1, 9) % 40).logits, model(tokens(1, 9) % 40).logits)
        assert model(tokens(1, 9) % 40, labels=tokens(1, 9) % 40).loss.isfinite()


@pytest.mark.parametrize("tied", [False, True])
def test_number_of_parameters(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    table = 61 * 32
    base = LinearLlama3Model(model.config)
    assert base.num_parameters() == model.num_parameters() - (0 if tied else table)
    assert base.num_parameters(exclude_embeddings=True) == base.num_parameters() - table
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - table


def ask_for_tensor_parallelism(folder: str) -> str:
    try:
        LinearLlama3ForCausalLM.from_pretrained(folder, tp_plan="auto")
    except ValueError as error:
        return str(error)
    return "loaded"


def test_tensor_and_pipeline_parallelism_are_refused(tmp_path: Path) -> None:
    """A plan for softmax layers would split linear layers wrongly. transformers 5.17 itself loads without a plan."""
    model = tiny_model()
    assert not model.supports_tp_plan and not model.supports_pp_plan
    assert not LinearLlama3ForCausalLM.is_backend_compatible(), "what serving engines ask before they apply a plan"
    model.save_pretrained(tmp_path)
    for message in run_distributed(ask_for_tensor_parallelism, 2, str(tmp_path)):
        assert message.startswith("there is no tensor- or pipeline-parallel plan for linear layers, got tp_plan='auto'")
    plan = {"layers.*.self_attn.q_proj": "colwise"}
    for options in (
        {"tp_plan": plan}, {"tp_size": 2}, {"distributed_config": SimpleNamespace(tp_plan=plan)},
        {"distributed_config": SimpleNamespace(tp_plan=None, tp_size=2)}, {"distributed_config": {"pp_size": 2}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"got (tp_plan={'layers|tp_size=2|pp_size=2)"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def test_fsdp_plan_names_what_exists() -> None:
    model = tiny_model()
    names = {name for name, _ in model.named_modules()}
    assert model._fsdp_plan, "inherited from transformers' config"
    for pattern in model._fsdp_plan:
        assert pattern.replace("*", "0") in names, pattern
