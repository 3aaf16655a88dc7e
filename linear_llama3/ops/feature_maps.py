"""Feature maps phi applied to queries and keys before a linear attention, each `[..., D] -> [..., D]`."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

FeatureMap = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """`x` itself (retention, arXiv:2307.08621; gated linear attention, arXiv:2312.06635)."""
    return x


def elu_plus_one(x: Tensor) -> Tensor:
    """`elu(x) + 1`, positive everywhere (linear transformers, arXiv:2006.16236)."""
    return F.elu(x) + 1


FEATURE_MAPS: dict[str, FeatureMap] = {"identity": identity, "silu": F.silu, "elu_plus_one": elu_plus_one}
"""Name in a config -> function. `silu` is the map of Lightning Attention (MiniMax-01, arXiv:2501.08313)."""
