"""Feature maps against their formulas: the weights phi(q) . phi(k) that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from linear_llama3.ops.feature_maps import FEATURE_MAPS

HEADS, DIM = 3, 5


def qk(dtype: torch.dtype = torch.float64, dim: int = DIM) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 7, HEADS, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in "qk")
    return q, k


def weights(name: str, q: Tensor, k: Tensor, **parameters: Tensor) -> Tensor:
    features = FEATURE_MAPS[name](q, **parameters), FEATURE_MAPS[name](k, **parameters)
    assert all(x.shape == (*q.shape[:-1], FEATURE_MAPS[name].size(q.shape[-1])) for x in features)
    return (features[0] * features[1]).sum(-1)


def test_without_parameters() -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(FEATURE_MAPS["identity"](x), x)
    torch.testing.assert_close(FEATURE_MAPS["silu"](x), x / (1 + torch.exp(-x)))
    torch.testing.assert_close(FEATURE_MAPS["elu_plus_one"](x), torch.where(x > 0, x + 1, torch.exp(x)))


def test_taylor_is_the_second_order_of_exp() -> None:
    q, k = qk()
    s = (q * k).sum(-1) / math.sqrt(DIM)
    torch.testing.assert_close(weights("taylor", q, k), 1 + s + s**2 / 2, rtol=0, atol=1e-12)
    assert FEATURE_MAPS["taylor"].size(16) == 153
    near = weights("taylor", 0.05 * q, k)
    torch.testing.assert_close(near, torch.exp(0.05 * s), rtol=1e-3, atol=0)


def test_rebased_is_the_square_of_a_normalised_product() -> None:
    q, k = qk()
    weight, bias = torch.rand(DIM, dtype=torch.float64) + 0.5, torch.rand(DIM, dtype=torch.float64)
    moved = [(x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() for x in (q, k)]
    moved = [x * weight + bias for x in moved]
    expected = (moved[0] * moved[1]).sum(-1) ** 2
    torch.testing.assert_close(weights("rebased", q, k, weight=weight, bias=bias), expected, rtol=0, atol=1e-12)
    assert FEATURE_MAPS["rebased"].size(16) == 136


def test_hedgehog_has_a_matrix_per_head() -> None:
    q, _ = qk()
    weight = torch.randn(HEADS, DIM, DIM, dtype=torch.float64)
    features = FEATURE_MAPS["hedgehog"](q, weight=weight)
    for head in range(HEADS):
        y = torch.exp(q[:, :, head] @ weight[head])
        torch.testing.assert_close(features[:, :, head, :DIM], y / y.sum(-1, keepdim=True))
        torch.testing.assert_close(features[:, :, head, DIM:], (1 / y) / (1 / y).sum(-1, keepdim=True))


def test_initial_parameters() -> None:
    """A learned map starts as its plain form."""
    q, _ = qk()
    initial = FEATURE_MAPS["hedgehog"].parameters(HEADS, DIM)
    torch.testing.assert_close(FEATURE_MAPS["hedgehog"](q, **initial)[..., :DIM], q.softmax(-1))
    rebased = FEATURE_MAPS["rebased"].parameters(HEADS, DIM)
    assert torch.equal(rebased["weight"], torch.ones(DIM)) and torch.equal(rebased["bias"], torch.zeros(DIM))


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_gradients(name: str) -> None:
    q, _ = qk()
    parameters = {n: x.double().requires_grad_() for n, x in FEATURE_MAPS[name].parameters(HEADS, DIM).items()}
    x = q[:1, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, *p: FEATURE_MAPS[name](x, **dict(zip(parameters, p, strict=True))), (x, *parameters.values())
    )


@pytest.mark.parametrize("name", ["taylor", "rebased"])
def test_large_weights_are_made_of_float32_features(name: str) -> None:
    """Products of features cancel: rounded to bfloat16, weights would be far off, or negative."""
    q, k = qk(torch.bfloat16, dim=16)
    parameters = FEATURE_MAPS[name].parameters(HEADS, 16)
    exact = weights(name, q.double(), k.double(), **{n: x.double() for n, x in parameters.items()})
    torch.testing.assert_close(weights(name, q, k, **parameters).double(), exact, rtol=1e-4, atol=1e-4)
