"""Feature maps phi of queries and keys: linear attention weighs a token by phi(q) . phi(k).

Functions of `[..., H, D]`; those that are learned take their parameters as further tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import working_dtype


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """A map, how many features it makes of D channels, what it learns, and whether weights are at least 0."""

    function: Callable[..., Tensor]  # (x [..., H, D], **parameters) -> [..., H, size(D)]
    size: Callable[[int], int] = lambda dim: dim
    parameters: Callable[[int, int], dict[str, Tensor]] = lambda heads, dim: {}  # (H, D) -> initial values
    non_negative: bool = True  # phi(q) . phi(k) >= 0: their sum can be divided by

    def __call__(self, x: Tensor, **parameters: Tensor) -> Tensor:
        return self.function(x, **parameters)


def identity(x: Tensor) -> Tensor:
    """`x` itself (retention, arXiv:2307.08621; gated linear attention, arXiv:2312.06635)."""
    return x


def elu_plus_one(x: Tensor) -> Tensor:
    """`elu(x) + 1`, positive everywhere (linear transformers, arXiv:2006.16236)."""
    return F.elu(x) + 1


def products(x: Tensor) -> Tensor:
    """The D (D + 1) / 2 products of two channels, `products(x) . products(y) = (x . y)^2`."""
    twice = math.sqrt(2) * x  # x_i x_j and x_j x_i are one feature
    rows = range(x.shape[-1])
    return torch.cat([x.square(), *(x[..., i : i + 1] * twice[..., i + 1 :] for i in rows)], dim=-1)


def taylor(x: Tensor) -> Tensor:
    """`phi(q) . phi(k) = 1 + s + s^2 / 2` with `s = q . k / sqrt(D)`, close to exp(s) and at least 1/2 (Based,
    arXiv:2402.18668, section 4.1). At least float32, as the features of large weights cancel."""
    x = x.to(working_dtype(x)) * x.shape[-1] ** -0.25
    return torch.cat([torch.ones_like(x[..., :1]), x, products(x) / math.sqrt(2)], dim=-1)


def rebased(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`phi(q) . phi(k) = (q' . k')^2` with `x' = weight * norm(x) + bias` over the D channels of a head (ReBased,
    arXiv:2402.10644, section 4); weight and bias `[D]`. At least float32, as the features of large weights cancel."""
    dtype = working_dtype(x)
    return products(F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype)))


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """`[softmax(x W), softmax(-x W)]` with a matrix W `[H, D, D]` per head (Hedgehog, arXiv:2402.04347)."""
    y = torch.einsum("...hd,hde->...he", x, weight.to(x.dtype)).to(working_dtype(x))
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1).to(x.dtype)


FEATURE_MAPS: dict[str, FeatureMap] = {
    "identity": FeatureMap(identity, non_negative=False),
    "silu": FeatureMap(F.silu, non_negative=False),  # of Lightning Attention (MiniMax-01, arXiv:2501.08313)
    "elu_plus_one": FeatureMap(elu_plus_one),
    "taylor": FeatureMap(taylor, size=lambda dim: 1 + dim + dim * (dim + 1) // 2),
    "rebased": FeatureMap(
        rebased,
        size=lambda dim: dim * (dim + 1) // 2,
        parameters=lambda heads, dim: {"weight": torch.ones(dim), "bias": torch.zeros(dim)},
    ),
    "hedgehog": FeatureMap(
        hedgehog,
        size=lambda dim: 2 * dim,
        parameters=lambda heads, dim: {"weight": torch.eye(dim).repeat(heads, 1, 1)},
    ),
}
"""Name in a config -> feature map."""
