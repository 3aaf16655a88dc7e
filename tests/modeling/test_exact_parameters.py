"""The bias of a learned decay stays float32 in 16-bit models, where rounding would remove its updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.trainer.parallelism import check_dtypes
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import tiny_config, tiny_model, tokens

BIAS = 6.001  # neither bfloat16 nor float16 can represent it


def with_bias(value: float = BIAS) -> LinearLlama3ForCausalLM:
    return tiny_model("gla", gate_bias_init=value, initializer_range=0.05)


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def biases(model: nn.Module) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("decay_bias")]


def loaded(folder: Path, dtype: Any) -> LinearLlama3ForCausalLM:
    with_bias().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def saved_in_half(folder: Path) -> LinearLlama3ForCausalLM:
    with_bias().bfloat16().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


WAYS: dict[str, Callable[[Path], LinearLlama3ForCausalLM]] = {
    "bfloat16()": lambda folder: with_bias().bfloat16(),
    "half()": lambda folder: with_bias().half(),
    "to(dtype)": lambda folder: with_bias().to(torch.bfloat16),
    "to(device, dtype)": lambda folder: with_bias().to("cpu", torch.float16),
    "from_config": lambda folder: AutoModelForCausalLM.from_config(
        tiny_config("gla", gate_bias_init=BIAS), dtype=torch.bfloat16
    ),
    "from_pretrained bfloat16": lambda folder: loaded(folder, torch.bfloat16),
    "from_pretrained float16": lambda folder: loaded(folder, "float16"),
    "saved in bfloat16": saved_in_half,
}


@pytest.mark.parametrize("way", WAYS)
def test_sixteen_bits_leave_the_bias_exact(tmp_path: Path, way: str) -> None:
    model = WAYS[way](tmp_path)
    others = {p.dtype for name, p in model.named_parameters() if not name.endswith("decay_bias")}
    assert others <= {torch.bfloat16, torch.float16} and len(biases(model)) == 2
    for bias in biases(model):
        assert bias.dtype == torch.float32 and (bias == torch.tensor(BIAS)).all()
    out = model(tokens(1, 9), labels=tokens(1, 9))
    out.loss.backward()
    assert out.logits.dtype in others and all(gradient(bias).dtype == torch.float32 for bias in biases(model))


def test_casts_keep_gradients_and_values() -> None:
    model = with_bias()
    model(tokens(1, 9), labels=tokens(1, 9)).loss.backward()
    before = [gradient(bias).clone() for bias in biases(model)]
    for cast, dtype in ((model.bfloat16, torch.float32), (model.double, torch.float64), (model.float, torch.float32)):
        cast()
        for bias, expected in zip(biases(model), before, strict=True):
            assert bias.dtype == gradient(bias).dtype == dtype
            torch.testing.assert_close(gradient(bias), expected.to(dtype), rtol=1e-2, atol=0)
            torch.testing.assert_close(bias, torch.full_like(bias, BIAS), rtol=1e-6, atol=0)


def test_small_updates_add_up() -> None:
    """Twenty steps of 0.001 each; near 6, bfloat16 values are 0.03 apart."""
    model = with_bias().bfloat16().train()
    optimizer = torch.optim.SGD(biases(model), lr=1.0)
    for _ in range(20):
        model(tokens(1, 9), labels=tokens(1, 9)).loss.backward()
        for bias in biases(model):
            assert gradient(bias).abs().max() > 0
            bias.grad = torch.full_like(bias, 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    for bias in biases(model):
        torch.testing.assert_close(bias, torch.full_like(bias, BIAS - 0.02), rtol=0, atol=1e-5)


def train_under_fsdp(dtype: torch.dtype) -> float:
    """Return how far a bias has moved after two steps of about 0.001."""
    model = with_bias().to(dtype).train()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        logits = model(tokens(1, 9)).logits
        logits.float().logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    parts = [bias for bias in biases(model) if isinstance(bias, DTensor)]
    return max(float((part.full_tensor() - BIAS).abs().max()) for part in parts)


def test_fsdp_with_mixed_precision_updates_the_bias() -> None:
    for moved in run_distributed(train_under_fsdp, 2, torch.float32):
        assert 1e-3 < moved < 2.1e-3


def test_fsdp_of_a_model_in_bfloat16_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"got \['torch.bfloat16', 'torch.float32'\]; load the model with"):
        check_dtypes(with_bias().bfloat16(), "no")
    check_dtypes(with_bias().bfloat16(), "bf16")  # accelerate makes the weights float32
    check_dtypes(with_bias(), "no")
    check_dtypes(tiny_model("basic").bfloat16(), "no")
