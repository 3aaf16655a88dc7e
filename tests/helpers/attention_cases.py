"""Random inputs of attention and the comparison of a run with its definition.

Tensors by name are `dict[str, Any]` where tests pass them on as keywords.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from linear_llama3.sequence_parallel import shard

GATES = ("none", "head", "scalar", "channel")


@dataclass(frozen=True, kw_only=True)
class Case:
    """The description of one call of linear attention."""

    tokens: int
    gate: str = "none"
    batch: int = 1
    groups: int = 1
    normalize: bool = False
    documents: tuple[int, ...] | None = None
    causal: bool = True
    initial_state: bool = False
    strength: float = 1.0  # of the decay, per token
    heads: int = 2
    key_dim: int = 5
    value_dim: int = 3
    dtype: torch.dtype = torch.float64

    def inputs(self) -> dict[str, Any]:
        """q, k, v, log_decay and initial_state where there are, the upstream gradient `w`; always the same."""
        generator = torch.Generator().manual_seed(self.tokens)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        b, t, h, k, v = self.batch, self.tokens, self.heads, self.key_dim, self.value_dim
        inputs = {"q": rand(b, t, h * self.groups, k), "k": rand(b, t, h, k), "v": rand(b, t, h, v)}
        if self.normalize:  # a positive denominator
            inputs["q"], inputs["k"] = inputs["q"].abs() + 0.1, inputs["k"].abs() + 0.1
        shapes = {"head": (h,), "scalar": (b, t, h), "channel": (b, t, h, k)}
        if self.gate != "none":
            inputs["log_decay"] = -self.strength * rand(*shapes[self.gate]).abs()
        if self.initial_state:
            rows = b if self.documents is None else len(self.documents) - 1
            inputs["initial_state"] = rand(rows, h, k, v + self.normalize).abs()
        inputs["w"] = rand(b, t, h * self.groups, v)
        return {name: x.to(self.dtype) for name, x in inputs.items()}

    def cu_seqlens(self) -> Tensor | None:
        return None if self.documents is None else torch.tensor(self.documents, dtype=torch.int32)


def leaves(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The inputs that have a gradient."""
    return {name: x.clone().requires_grad_() for name, x in inputs.items() if name != "w"}


def on_all_ranks(layout: str = "contiguous") -> dict[str, Any]:
    """Keywords of a call on all ranks."""
    return {"group": dist.group.WORLD, "layout": layout}


def shards(
    inputs: dict[str, Tensor], *, group: dist.ProcessGroup | None = None, layout: str = "contiguous"
) -> dict[str, Any]:
    """This rank's part of all inputs that have tokens; padding holds nan, that of the upstream gradient `w` zeros.

    group: default: all ranks.
    """
    group = group or dist.group.WORLD
    return {
        name: x if x.dim() == 1 else shard(x, group=group, layout=layout, padding=0 if name == "w" else np.nan)
        for name, x in inputs.items()
    }


def relative_error(got: Tensor | np.ndarray, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected."""
    got = torch.as_tensor(got)
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def positions(rank: int, ranks: int, tokens: int, layout: str) -> np.ndarray:
    """Global positions of a rank's `tokens` local tokens, by the definition of the layout."""
    i = np.arange(tokens)
    if layout == "contiguous" or ranks == 1:
        return rank * tokens + i
    half = tokens // 2
    return np.where(i < half, rank * half + i, (2 * ranks - 1 - rank) * half + i - half)


def join(parts: list[np.ndarray], layout: str) -> np.ndarray:
    """The parts of all ranks `[B, C, ...]` as one padded sequence `[B, W * C, ...]`."""
    order = np.concatenate([positions(r, len(parts), parts[0].shape[1], layout) for r in range(len(parts))])
    return np.concatenate(parts, axis=1)[:, np.argsort(order)]
