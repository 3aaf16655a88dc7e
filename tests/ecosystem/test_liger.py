"""Liger's kernels take the place of transformers' Llama functions: refused where asked for, harmless elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from linear_llama3.modeling import attention
from linear_llama3.sequence_parallel import SequenceParallelContext
from linear_llama3.trainer import LinearLlama3TrainingArguments
from tests.helpers.tiny import tiny_model


def test_the_trainer_refuses_them(tmp_path: Path) -> None:
    """Trainer would log a line and train without them."""
    with pytest.raises(ValueError, match=r"use_liger_kernel must be False.*got True"):
        LinearLlama3TrainingArguments(str(tmp_path), use_cpu=True, use_liger_kernel=True)


def test_rotation_under_sequence_parallelism_does_not_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's rotation takes [B, H, T, D] alone, and turns [B, T, H, D] by the positions of heads."""
    model = tiny_model(attn_implementation="eager")
    plain: Any = model.model.layers[1].self_attn
    x, positions = torch.randn(1, 8, model.config.hidden_size), torch.arange(8)[None]
    rotation = model.model.rotary_emb(x, position_ids=positions)
    mask = torch.full((8, 8), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = plain(x, position_embeddings=rotation, attention_mask=mask)
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", None)
        spec = importlib.util.spec_from_file_location("linear_llama3.modeling.imported_after_liger", attention.__file__)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        layer = module.LinearLlama3Attention(model.config, 1)
        layer.load_state_dict(plain.state_dict())
        layer.sequence_parallel_context = SequenceParallelContext(None)
        assert (layer(x, position_embeddings=rotation)[0] - expected).abs().max() < 1e-5
