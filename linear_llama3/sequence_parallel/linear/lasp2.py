"""LASP-2 (arXiv 2502.07563, Algorithms 2 and 4): one all-gather of a small state, whatever the sequence length.

Every rank gathers all states and folds those before it (in reverse: behind it) in order,

    X <- a_j * X + S_j,        a_j = e^{A_j} the decay over rank j's tokens, 0 where a document starts on it.

The paper has no decay; its sum over the earlier ranks is the case a = 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import all_gather, group_rank


def lasp2(state: Tensor, factor: Tensor | None, *, group: dist.ProcessGroup, reverse: bool) -> Callable[[], Tensor]:
    """Starts the exclusive affine scan over the ranks of `group`; the returned function waits for its result.

    Args:
        state: what this rank adds, `[B, H, D_k, D_v]`, float32 or float64.
        factor: what is left of a state that passes this rank, `[B, H, D_k]`; None where it is 1 on every rank.
        reverse: scan from the last rank to the first (gradients).
    """
    # The decay rides as one more column of the state: one message.
    message = state if factor is None else torch.cat([state, factor.unsqueeze(-1)], dim=-1)
    pending = all_gather(message, group)

    def wait() -> Tensor:
        gathered, rank = pending.wait(), group_rank(group)
        others = range(len(gathered) - 1, rank, -1) if reverse else range(rank)
        prefix = torch.zeros_like(state)
        for j in others:
            if factor is None:
                prefix += gathered[j]
            else:
                prefix = gathered[j][..., -1:] * prefix + gathered[j][..., :-1]
        return prefix

    return wait
