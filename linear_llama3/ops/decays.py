"""Constant decays: one natural logarithm per key/value head, `[H_kv]` float32, <= 0."""

from __future__ import annotations

import torch
from torch import Tensor


def lightning_log_decay(num_heads: int, layer_idx: int, num_layers: int) -> Tensor:
    """MiniMax-01's slopes (arXiv:2501.08313): geometric over heads, fading with depth; `[num_heads]` float32.

    Head h of layer l forgets at rate `2^(-8(h+1)/H) * (1 - l / (L - 1 + 1e-5) + 1e-5)`, so the last layer
    hardly forgets at all. The small constants are the published model's.
    """
    rates = torch.exp2(-8.0 / num_heads * torch.arange(1, num_heads + 1, dtype=torch.float32))
    return -rates * (1 - layer_idx / (num_layers - 1 + 1e-5) + 1e-5)


def retention_log_decay(num_heads: int) -> Tensor:
    """RetNet's decays (arXiv:2307.08621, section 3.1): `ln(1 - 2^(-5-h))` of head h; `[num_heads]` float32."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(num_heads, dtype=torch.float32)))
