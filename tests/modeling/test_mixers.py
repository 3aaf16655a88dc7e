"""Linear attention layers equal their recurrence, written here token by token in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_llama3.modeling import LinearAttention
from linear_llama3.ops.feature_maps import FEATURE_MAPS
from tests.helpers.tiny import MIXER_NAMES, tiny_config, tiny_model


def make_layer(mixer: str, **fields: Any) -> LinearAttention:
    torch.manual_seed(0)
    layer = LinearAttention(tiny_config(mixer, full_attention_interval=0, **fields), layer_idx=1).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def rotary_table(length: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat([-right, left], -1) * sin[:, :, None]


def reference(
    layer: LinearAttention,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    *,
    mixer: str,
    gated: bool = True,
) -> Tensor:
    config = layer.config
    heads, (kv_heads, d_k, d_v) = config.num_attention_heads, config.linear_sizes
    batch, length = x.shape[:2]
    q = layer.q_proj(x).view(batch, length, heads, d_k)
    k = layer.k_proj(x).view(batch, length, kv_heads, d_k)
    v = layer.v_proj(x).view(batch, length, kv_heads, d_v)
    if mixer in ("basic", "lightning"):
        q, k = q * q.sigmoid(), k * k.sigmoid()
    if mixer == "retention":
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if mixer in ("based", "rebased"):
        return project(layer, x, quotient(layer, q, k, v, mask, mixer), mixer=mixer, gated=gated)
    factor = torch.ones(batch, length, kv_heads, d_k, dtype=x.dtype)
    if mixer == "gla":
        gate = layer.decay_up_proj(layer.decay_down_proj(x)) + layer.decay_bias
        factor = gate.view(batch, length, kv_heads, d_k).sigmoid() ** (1 / 16)
    for head in range(kv_heads):
        if mixer == "retention":
            factor[:, :, head] = 1 - 2.0 ** (-5 - head)
        if mixer == "lightning":
            depth = 1 - layer.layer_idx / (config.num_hidden_layers - 1 + 1e-5) + 1e-5
            factor[:, :, head] = math.exp(-(2 ** (-8 * (head + 1) / kv_heads)) * depth)
    state = torch.zeros(batch, kv_heads, d_k, d_v, dtype=x.dtype)
    outputs = []
    for t in range(length):
        kept = mask[:, t, None, None, None]
        new = factor[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        state = torch.where(kept, new, state)
        per_query_head = state.repeat_interleave(heads // kv_heads, dim=1)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], per_query_head) / math.sqrt(d_k))
    out = torch.stack(outputs, 1)
    out = out / (out.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * layer.o_norm.weight
    return project(layer, x, out, mixer=mixer, gated=gated)


def quotient(layer: LinearAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, mixer: str) -> Tensor:
    """Weigh every past token by a polynomial of q . k; divide by the sum of the weights."""
    if mixer == "rebased":
        maps: list[Any] = [layer.q_feature_map, layer.k_feature_map]
        q, k = (
            (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * m.weight + m.bias
            for x, m in zip((q, k), maps, strict=True)
        )
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k)
    weights = s**2 if mixer == "rebased" else 1 + s / math.sqrt(q.shape[-1]) + s**2 / (2 * q.shape[-1])
    weights = weights * mask[:, None, None] * torch.ones(q.shape[1], q.shape[1]).tril()
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhij,bjhd->bihd", torch.where(total > 0, weights / total.clamp(min=1e-30), 0), v)


def project(layer: LinearAttention, x: Tensor, out: Tensor, *, mixer: str, gated: bool) -> Tensor:
    out = out.flatten(2)
    if gated:
        gate = layer.g_proj(x)
        out = out * (gate.sigmoid() if mixer == "lightning" else gate * gate.sigmoid())
    return layer.o_proj(out)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_outputs_and_gradients_equal_the_recurrence(mixer: str, padded: bool) -> None:
    layer = make_layer(mixer, linear_value_head_dim=6, attention_bias=True)
    x = torch.randn(2, 37, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 37, dtype=torch.bool)
    if padded:
        mask[0, :5] = mask[1, 11:14] = mask[1, -3:] = False
    cos, sin = rotary_table(37, 8)
    expected = reference(layer, x, cos, sin, mask, mixer=mixer)
    out, weights = layer(
        x,
        position_embeddings=(cos, sin),
        attention_mask=mask.long() if padded else None,
        past_key_values=None,
    )
    assert weights is None
    # RMSNorm of transformers runs in float32, as does the constant decay
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-6)
    cotangent = torch.randn_like(out) * mask[:, :, None]
    inputs = {"x": x, **dict(layer.named_parameters())}
    for name, got, want in zip(
        inputs,
        torch.autograd.grad(out, list(inputs.values()), cotangent),
        torch.autograd.grad(expected, list(inputs.values()), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()), msg=name)


def test_without_output_gate() -> None:
    layer = make_layer("gla", linear_output_gate=False)
    assert not hasattr(layer, "g_proj")
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    mask = torch.ones(1, 9, dtype=torch.bool)
    cos, sin = rotary_table(9, 8)
    expected = reference(layer, x, cos, sin, mask, mixer="gla", gated=False)
    torch.testing.assert_close(layer(x, position_embeddings=(cos, sin))[0], expected, rtol=2e-5, atol=2e-6)


def fading(layer: LinearAttention, mixer: str, x: Tensor, features: int) -> Tensor:
    """Return the decay of every token, head and feature, `[T, H_kv, F]`."""
    factor = torch.ones(x.shape[1], 2, features, dtype=x.dtype)
    if mixer == "gla":
        gate = (layer.decay_up_proj(layer.decay_down_proj(x)) + layer.decay_bias).sigmoid() ** (1 / 16)
        return gate.view(*factor.shape)
    if mixer == "retention":
        return factor * (1 - 2.0 ** (-5 - torch.arange(2.0, dtype=x.dtype))).view(2, 1)
    return factor * layer.log_decay.double().exp().view(2, 1) if mixer == "lightning" else factor


@pytest.mark.parametrize("mixer", MIXER_NAMES)
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_every_feature_map_with_every_mixer(name: str, mixer: str) -> None:
    """Outputs equal the recurrence over the features, without RMSNorm; every parameter has a gradient."""
    normalize, rope = mixer in ("based", "rebased"), mixer == "retention" and name not in ("taylor", "rebased")
    fields: dict[str, Any] = {"linear_use_rope": rope, "linear_output_gate": False, "linear_output_norm": False}
    fields |= {"linear_feature_map": name, "linear_key_head_dim": 4 if name == "hedgehog" else 8}
    if normalize and name in ("identity", "silu"):  # the weights have both signs, and their sum may be 0
        with pytest.raises(ValueError, match=f"must not be negative, got linear_feature_map='{name}'; set it to one"):
            make_layer(mixer, **fields)
        return
    layer = make_layer(mixer, **fields)
    assert not hasattr(layer, "o_norm")
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    table = rotary_table(9, 8)
    maps = dict(layer.q_feature_map.named_parameters()), dict(layer.k_feature_map.named_parameters())
    q = FEATURE_MAPS[name](layer.q_proj(x).view(1, 9, 4, -1), **maps[0])
    k = FEATURE_MAPS[name](layer.k_proj(x).view(1, 9, 2, -1), **maps[1])
    features = layer.config.linear_state_shape[1]
    assert q.shape[-1] == k.shape[-1] == features
    if rope:
        q, k = rotate(q, *table), rotate(k, *table)
    v, factor = layer.v_proj(x).view(1, 9, 2, -1), fading(layer, mixer, x, features)
    state, outputs = torch.zeros(2, features, 9, dtype=x.dtype), []
    for t in range(9):
        ones = torch.cat([v[0, t], torch.ones(2, 1, dtype=x.dtype)], -1)
        state = factor[t, :, :, None] * state + k[0, t, :, :, None] * ones[:, None]
        read = torch.einsum("hk,hkv->hv", q[0, t], state.repeat_interleave(2, dim=0))
        outputs.append(read[:, :-1] / (read[:, -1:] if normalize else math.sqrt(features)))
    expected = layer.o_proj(torch.stack(outputs).view(1, 9, -1))
    out = layer(x, position_embeddings=table)[0]
    bound = 2e-3 if name == "rebased" and normalize else 2e-5
    torch.testing.assert_close(out, expected, rtol=bound, atol=bound)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_an_rms_norm_undoes_the_division() -> None:
    """Both scale a head by a positive number per token, so a mixer has one or the other."""
    layer = make_layer("based", linear_output_norm=True, rms_norm_eps=0.0)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    divided = layer(x, position_embeddings=rotary_table(9, 8))[0]
    layer.mixer = dataclasses.replace(layer.mixer, normalize=False)
    torch.testing.assert_close(layer(x, position_embeddings=rotary_table(9, 8))[0], divided, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing_with_a_map_that_is_positive_at_zero() -> None:
    layer = make_layer("basic", linear_feature_map="elu_plus_one", attention_bias=True)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    cos, sin = rotary_table(12, 8)
    padded = torch.cat([torch.randn(1, 3, 32, dtype=torch.float64), x], 1)
    mask = torch.tensor([[0] * 3 + [1] * 9])
    out = layer(padded, position_embeddings=(cos, sin), attention_mask=mask)[0]
    alone = layer(x, position_embeddings=rotary_table(9, 8))[0]
    torch.testing.assert_close(out[:, 3:], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixer", ["lightning", "retention"])
def test_casts_do_not_round_constants(mixer: str) -> None:
    """The decay and the rotary frequencies are unchanged."""
    model = tiny_model(mixer)
    exact = {name: x.clone() for name, x in model.named_buffers()}
    assert {"log_decay", "inv_freq", "original_inv_freq"} == {name.split(".")[-1] for name in exact}
    for cast in (model.bfloat16, model.half, model.double, model.float):
        for name, x in cast().named_buffers():
            assert x.dtype == torch.float32 and torch.equal(x, exact[name]), name


@pytest.mark.parametrize("mixer", ["basic", "lightning", "retention"])  # a decay per channel turns with the rotation
def test_rotary_layers_see_relative_positions(mixer: str) -> None:
    layer = make_layer(mixer, linear_use_rope=True)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    cos, sin = rotary_table(40, 8)
    near = layer(x, position_embeddings=(cos[:, :9], sin[:, :9]))[0]
    far = layer(x, position_embeddings=(cos[:, 31:], sin[:, 31:]))[0]
    torch.testing.assert_close(near, far, rtol=0, atol=1e-6)
