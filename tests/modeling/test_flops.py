"""FLOPs against torch's counter, with linear attention as the recurrence, and against the formula for Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM, LinearLlama3ForMaskedLM
from linear_llama3.modeling import mixers
from linear_llama3.modeling.flops import (
    attention_pairs,
    batch_flops,
    count_flops,
    known_peak,
    peak_flops,
)
from tests.helpers.marks import slow_unless
from tests.helpers.tiny import MIXER_NAMES, tiny_config, tiny_model, tokens

BATCH, LENGTH = 2, 24


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None, normalize: bool, **rest: Any
) -> tuple[Tensor, None]:
    """Compute linear attention token by token, with products that torch's counter sees."""
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1], dtype=v.dtype)
    groups, out = q.shape[2] // k.shape[2], []
    for t in range(k.shape[1]):
        if log_decay is not None:
            decay = log_decay[:, t] if log_decay.dim() == 4 else log_decay.unsqueeze(-1)
            state = state * decay.exp().unsqueeze(-1)
        state = state + k[:, t].unsqueeze(-1) @ v[:, t].unsqueeze(-2)
        out.append(q[:, t].unflatten(1, (-1, groups)) @ state)
    y = torch.stack(out, 1).flatten(2, 3)
    return (y[..., :-1] / y[..., -1:] if normalize else y), None


def counted(model: Any) -> tuple[int, int]:
    """Return torch's count of the forward pass, and of forward and backward."""
    ids = tokens(BATCH, LENGTH)
    model.train()
    table = model.model.rotary_emb(torch.zeros(1), position_ids=torch.arange(LENGTH).unsqueeze(0))
    model.model.rotary_emb.forward = lambda *args, **kwargs: table  # a matrix product in some releases of transformers
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


def own(model: nn.Module) -> tuple[int, int]:
    """Return our count with every key visible to every query: eager attention computes masked scores as well."""
    result = count_flops(model, BATCH * LENGTH, attention_pairs([LENGTH] * BATCH, causal=False))
    return result.forward, result.training


@slow_unless(
    lambda fields, mixer: fields == "default" or mixer == "gla",
    fields=["default", "no gate, D_v 12"],
    mixer=[*MIXER_NAMES, "basic with hedgehog"],
)
def test_the_count_equals_torchs_counter(fields: str, mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {} if fields == "default" else {"linear_output_gate": False, "linear_value_head_dim": 12}
    if mixer not in MIXER_NAMES:
        mixer, changes = "basic", {**changes, "linear_feature_map": "hedgehog", "tie_word_embeddings": True}
    monkeypatch.setattr(mixers, "linear_attention", recurrence)
    model = tiny_model(mixer, attn_implementation="eager", **changes)
    assert own(model) == counted(model)


def test_gradients_of_frozen_weights_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one projection and the embedding learn; the latter needs the gradients of all activations."""
    monkeypatch.setattr(mixers, "linear_attention", recurrence)
    model = tiny_model("lightning", linear_feature_map="hedgehog", attn_implementation="eager").requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    model.model.layers[2].mlp.up_proj.requires_grad_(True)
    result = own(model)
    assert result == counted(model)
    assert result[1] < 2.4 * result[0]


def test_adapters_are_counted() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("basic")
    before = count_flops(model, 10, 0)
    adapted = count_flops(
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], r=3)), 10, 0
    )
    q, up = 32 + 32, 32 + 48  # widths in and out
    assert adapted.projections == before.projections + 2 * 10 * 4 * 3 * q
    assert adapted.mlp == before.mlp + 2 * 10 * 4 * 3 * up and adapted.head == before.head
    assert adapted.frozen == before.projections + before.mlp  # not the head, not the adapters


def test_the_count_equals_the_formula_for_llama() -> None:
    """6 N + 12 L H D T for a token where every query sees every key (PaLM, appendix B); half the second if causal."""
    config = LinearLlama3Config.from_preset("linear-llama-3.1-8b-pure", full_attention_interval=1)
    with torch.device("meta"):
        model = LinearLlama3ForCausalLM(config)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name)
    length = 8192
    attention = 12 * 32 * 32 * 128 * length
    every = count_flops(model, length, attention_pairs([length], causal=False))
    assert every.training == length * (6 * weights + attention)
    causal = count_flops(model, length, attention_pairs([length]))
    assert causal.training == length * 6 * weights + length * attention // 2 * (length + 1) // length
    assert 7.4e9 < weights < 7.6e9 and every.linear_attention == 0


def test_linear_layers_cost_the_same_per_token_at_any_length() -> None:
    """4 D_k D_v per head and token for the basic mixer with a kv head for each query head."""
    with torch.device("meta"):
        config = tiny_config("basic", full_attention_interval=0, num_key_value_heads=4)
        model = LinearLlama3ForCausalLM(config)
    for length in (10, 1000):
        result = count_flops(model, length, attention_pairs([length]))
        assert result.linear_attention == length * 4 * 8 * 8 * 4 * 4 and result.softmax_attention == 0


@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "rows"])
def test_documents_of_a_batch_are_recognized(told: str) -> None:
    model, ids = tiny_model("gla"), tokens(2, 12)
    lengths = [5, 7, 12] if told != "rows" else [12, 12]
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if told == "position_ids":
        batch[told] = torch.cat([torch.arange(n) for n in lengths]).view(2, 12)
    elif told != "rows":
        batch[told] = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    assert batch_flops(model, batch) == count_flops(model, 24, sum(n * (n + 1) // 2 for n in lengths))
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    assert batch_flops(model, batch) == count_flops(model, 24, sum(n * (n + 1) // 2 for n in lengths))


def test_a_bidirectional_batch_sees_all_pairs() -> None:
    model = LinearLlama3ForMaskedLM(tiny_config("basic", is_causal=False))
    batch = {"input_ids": tokens(2, 12), "attention_mask": torch.ones(2, 12)}
    assert batch_flops(model, batch) == count_flops(model, 24, 2 * 12**2)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert known_peak(name) == peak


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
