"""Linear attention as it is defined: token after token.

Slow on purpose. It is the oracle of the tests (in float64), and for one token it is the decoding step.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .precision import working_dtype


def recurrent_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    boundaries: tuple[int, ...],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`q` `[B, T, H_q, D_k]`, `k` `[B, T, H_kv, D_k]`, `v` `[B, T, H_kv, D_v]`, `log_decay` None,
    `[H_kv]` or `[B, T, H_kv(, D_k)]`.

    Returns out `[B, T, H_q, D_v]` and the state after each document `[B or N, H_kv, D_k, D_v]`, both in float32
    (float64 for float64 inputs). Differentiable by plain autograd.
    """
    work = working_dtype(q)
    batch, _, kv_heads, key_dim = k.shape
    q, k, v = q.to(work) * scale, k.to(work), v.to(work)
    q = q.unflatten(2, (kv_heads, -1))  # [B, T, H_kv, G, D_k]: G query heads read one state
    decay = None if log_decay is None else log_decay.to(work).exp()
    if decay is not None and decay.dim() < 4:
        decay = decay.expand(k.shape[:3]).unsqueeze(-1)  # [B, T, H_kv, 1 or D_k]

    # unbind: the gradient of x[:, t] is as large as x, for every t
    queries, keys, values = q.unbind(1), k.unsqueeze(-1).unbind(1), v.unsqueeze(-2).unbind(1)
    decays = None if decay is None else decay.unsqueeze(-1).unbind(1)
    outs, finals = [], []
    for n, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        if initial_state is None:
            state = k.new_zeros(batch, kv_heads, key_dim, v.shape[-1])
        else:
            state = initial_state.to(work).unflatten(0, (-1, batch))[n]
        for t in range(start, stop):
            if decays is not None:
                state = decays[t] * state
            state = state + keys[t] * values[t]
            outs.append((queries[t] @ state).flatten(1, 2))
        finals.append(state)
    return torch.stack(outs, dim=1), torch.cat(finals)
