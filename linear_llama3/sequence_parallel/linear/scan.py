"""What the exchanges of linear states share: the message of a link, and one step of the scan.

A strategy is a function

    strategy(states, factors, *, group, chain, reverse) -> wait

that starts the exclusive affine scan over the chain of all ranks' links; `wait()` returns the state that enters each
of this rank's links, `[L, B, H, D_k, D_v]`. With X = 0 at the start of the chain (in reverse: at its end),

    X <- a_c * X + S_c        after every link c,  a_c = e^{A_c} the decay over its tokens, 0 where a document starts.

states: what this rank's links add, `[L, B, H, D_k, D_v]`, float32 or float64. factors: a, `[L, B, H, D_k]`, or None
where it is 1 on every rank. group: the ranks that share the sequence. chain: (rank, place) of every link in the order
of the sequence. reverse: from the last link to the first (gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Chain = Sequence[tuple[int, int]]


class Scan(Protocol):
    """A strategy for linear layers."""

    def __call__(
        self, states: Tensor, factors: Tensor | None, *, group: dist.ProcessGroup, chain: Chain, reverse: bool
    ) -> Callable[[], Tensor]: ...


def pack(states: Tensor, factors: Tensor | None) -> Tensor:
    """One message: the decay rides as one more column of the state."""
    return states if factors is None else torch.cat([states, factors.unsqueeze(-1)], dim=-1)


def fold(state: Tensor, message: Tensor) -> Tensor:
    """a * X + S. The one expression for it, so that all strategies round alike (`ops.triton.merge` is the same)."""
    if message.shape[-1] == state.shape[-1]:
        return state + message
    factor, own = message[..., -1:], message[..., :-1]
    return torch.where(factor == 0, own, factor * state + own)  # where nothing is left, inf and nan neither
