"""Linear attention without a causal mask: every token of a document reads the document's one total state."""

from __future__ import annotations

import itertools
from collections.abc import Callable

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
    complete: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `recurrent_linear_attention`; plain autograd.

    `complete` turns the states of this device's pieces of documents `[N, B, H_kv, D_k, D_v]` into those of the
    whole documents, where documents reach over several devices.
    """
    work = working_dtype(q)
    batch, _, kv_heads, _ = k.shape
    q, k, v = q.to(work) * scale, k.to(work), v.to(work)
    # A device without a token has one piece, an empty one: it takes part in `complete`, backward too.
    pieces = list(itertools.pairwise(boundaries)) or [(0, 0)]
    states = torch.stack([torch.einsum("bthk,bthv->bhkv", k[:, a:b], v[:, a:b]) for a, b in pieces])
    if initial_state is not None:
        states = states + initial_state.to(work).unflatten(0, (-1, batch))
    if complete is not None:
        states = complete(states)

    q = q.unflatten(2, (kv_heads, -1))  # [B, T, H_kv, G, D_k]
    outs = [torch.einsum("bthgk,bhkv->bthgv", q[:, a:b], state) for (a, b), state in zip(pieces, states, strict=True)]
    return torch.cat(outs, dim=1).flatten(2, 3), states.flatten(0, 1)
