"""Constant decays against the models they come from."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from linear_llama3.ops.decays import lightning_log_decay, retention_log_decay


@pytest.mark.parametrize(("num_heads", "num_layers"), [(4, 3), (6, 5), (8, 2)])
def test_lightning_decay_is_minimax_slope_rate(num_heads: int, num_layers: int) -> None:
    config = MiniMaxConfig(
        hidden_size=8 * num_heads, num_attention_heads=num_heads, num_key_value_heads=num_heads, head_dim=8,
        num_hidden_layers=num_layers, block_size=4, layer_types=["linear_attention"] * num_layers,
    )  # fmt: skip
    for layer_idx in range(num_layers):
        expected = -MiniMaxLightningAttention(config, layer_idx).slope_rate.flatten()
        log_decay = lightning_log_decay(num_heads, layer_idx, num_layers)
        assert log_decay.dtype == torch.float32
        assert (log_decay < 0).all()
        torch.testing.assert_close(log_decay, expected.float(), rtol=1e-6, atol=0)


def test_lightning_decay_of_a_single_layer_is_finite() -> None:
    assert torch.isfinite(lightning_log_decay(4, 0, 1)).all()


def test_retention_decay_is_the_papers() -> None:
    expected = [math.log(1 - 2.0 ** (-5 - head)) for head in range(16)]
    log_decay = retention_log_decay(16)
    assert log_decay.dtype == torch.float32
    torch.testing.assert_close(log_decay, torch.tensor(expected), rtol=1e-6, atol=0)
