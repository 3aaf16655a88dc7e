"""The exclusive scan of states over the ranks: its interface, its message, and one step of it.

A strategy for linear layers is a function

    strategy(states, decays, *, group, chain, reverse) -> wait

that starts the exclusive affine scan over the chunks of all ranks; `wait()` returns the state that enters each of this
rank's chunks, `[L, B, H, D_k, D_v]`. With X = 0 at the start of the sequence (in reverse: at its end),

    X <- a_c * X + S_c        after every chunk c,  a_c = e^{A_c} the decay over its tokens, 0 where a document starts.

states: what this rank's L chunks add, `[L, B, H, D_k, D_v]`, float32 or float64. decays: a, `[L, B, H, D_k]`, or None
where it is 1 on every rank. group: the ranks that share the sequence. chain: (rank, place on the rank) of every chunk
in the order of the sequence. reverse: from the last chunk to the first, for gradients.

Only collectives may be started before `wait`. Messages between two ranks are matched by their order alone, so a
strategy that sends such messages sends them in `wait`: an attention that never receives its queries, after an error,
then leaves no message behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Chain = Sequence[tuple[int, int]]


class StateScan(Protocol):
    """A strategy for linear layers."""

    def __call__(
        self, states: Tensor, decays: Tensor | None, *, group: dist.ProcessGroup, chain: Chain, reverse: bool
    ) -> Callable[[], Tensor]: ...


def pack(states: Tensor, decays: Tensor | None) -> Tensor:
    """Build one message: the decay is one more column of the state."""
    return states if decays is None else torch.cat([states, decays.unsqueeze(-1)], dim=-1)


def fold(state: Tensor, message: Tensor) -> Tensor:
    """Compute a * X + S. All strategies use this expression, so they round alike (`ops.triton.merge` is the same)."""
    if message.shape[-1] == state.shape[-1]:
        return state + message
    decay, own = message[..., -1:], message[..., :-1]
    return torch.where(decay == 0, own, decay * state + own)  # a decay of 0 also removes inf and nan
