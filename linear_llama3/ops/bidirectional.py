"""Linear attention without a causal mask: every token of a document reads the document's one total state.

Two differentiable steps, so that a caller may sum the states of documents that span several devices in between.
Shapes as in `recurrent_linear_attention`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .precision import working_dtype


def bidirectional_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    boundaries: tuple[int, ...],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute out `[B, T, H_q, D_v]` and the state of every document `[B or N, H_kv, D_k, D_v]`."""
    states = document_states(k, v, boundaries)
    if initial_state is not None:
        states = states + initial_state.to(states.dtype).unflatten(0, (-1, k.shape[0]))
    return read_states(q, states, scale=scale, boundaries=boundaries), states.flatten(0, 1)


def document_states(k: Tensor, v: Tensor, boundaries: tuple[int, ...]) -> Tensor:
    """The sum of k v^T over each document, `[N, B, H_kv, D_k, D_v]`; one sum of zero where there are no tokens."""
    work = working_dtype(k)
    k, v = k.to(work), v.to(work)
    return torch.stack([torch.einsum("bthk,bthv->bhkv", k[:, a:b], v[:, a:b]) for a, b in _pieces(boundaries)])


def read_states(q: Tensor, states: Tensor, *, scale: float, boundaries: tuple[int, ...]) -> Tensor:
    """The outputs `[B, T, H_q, D_v]` of queries that read the state of their document."""
    q = (q.to(states.dtype) * scale).unflatten(2, (states.shape[2], -1))  # [B, T, H_kv, G, D_k]
    pieces = zip(_pieces(boundaries), states, strict=True)
    outs = [torch.einsum("bthgk,bhkv->bthgv", q[:, a:b], state) for (a, b), state in pieces]
    return torch.cat(outs, dim=1).flatten(2, 3)


def _pieces(boundaries: tuple[int, ...]) -> list[tuple[int, int]]:
    """The documents; an empty one on a device without tokens, which takes part in sums all the same."""
    return list(itertools.pairwise(boundaries)) or [(0, 0)]
