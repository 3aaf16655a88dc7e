"""Softmax attention over a sequence that is spread over several ranks. One strategy, one file."""

from __future__ import annotations

from collections.abc import MutableMapping
from numbers import Integral
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ...ops.checks import check_shapes
from ...ops.precision import without_autocast
from ...ops.softmax_attention import softmax_attention as attention_on_one_device
from ...ops.visibility import Visibility
from ..collectives import world_size
from ..costs import choose_softmax, sizes_of
from ..sequence_shard import resolve_shard
from .lasp2h import lasp2h
from .ring import ring
from .rsa import rsa
from .strategy import AttentionSpec, SoftmaxStrategy
from .token_ring import token_ring
from .ulysses import ulysses

SOFTMAX_STRATEGIES: dict[str, SoftmaxStrategy] = {
    "lasp2h": lasp2h,
    "ring": ring,
    "token_ring": token_ring,
    "rsa": rsa,
    "ulysses": ulysses,
}


def get_softmax_strategy(name: str) -> SoftmaxStrategy:
    if name not in SOFTMAX_STRATEGIES:
        raise ValueError(
            f"the strategy for softmax layers must be one of {sorted(SOFTMAX_STRATEGIES)}, got {name!r}; "
            "register new ones in SOFTMAX_STRATEGIES"
        )
    return SOFTMAX_STRATEGIES[name]


@without_autocast
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None,
    strategy: str = "lasp2h",
    layout: str = "contiguous",
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    sliding_window: int | None = None,
    causal: bool = True,
    length: int | None = None,
    exchange_cache: MutableMapping[str, Any] | None = None,
) -> Tensor:
    """Softmax attention of the complete sequence, local shards in and out.

    Args:
        q: `[B, C, H_q, D]`, the tokens of this rank.
        k: `[B, C, H_kv, D]`, H_q a multiple of H_kv; never expanded.
        v: `[B, C, H_kv, D_v]`.
        group: the ranks that share the sequence, in order, each with the same number of local tokens (as `shard`
            gives); None or a group of one is plain attention.
        strategy: a name of SOFTMAX_STRATEGIES, or "auto": the cheapest by the model in `costs.py`.
        layout: a name of LAYOUTS.
        scale: of the scores. Default: `D ** -0.5`.
        cu_seqlens: document edges of the complete sequence, int `[N + 1]`, for a batch of 1.
        sliding_window: w lets a token see itself and the w - 1 before it.
        causal: False lets every token see all of its document.
        length: true length of the complete sequence, where its tail is padding; its outputs are 0.
        exchange_cache: an empty mapping that lives as long as this layer's forward pass and its recomputation under
            gradient checkpointing. It keeps what the recomputation needs of an exchange: the output, or with "ulysses"
            what was received. "lasp2h" gathers K and V once more for its backward pass, "rsa" repeats both rings.

    Returns:
        out `[B, C, H_q, D_v]` in the dtype of v.
    """
    if strategy != "auto":
        get_softmax_strategy(strategy)
    check_shapes(q, k, v)
    if sliding_window is not None:
        _check_window(sliding_window, causal)
    shard = resolve_shard(
        q.shape[1], batch=q.shape[0], group=group, layout=layout, cu_seqlens=cu_seqlens, length=length
    )
    visibility = Visibility(documents=shard.documents, causal=causal, window=sliding_window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    padding = q.shape[1] - shard.tokens
    q, k, v = (x[:, : shard.tokens] for x in (q, k, v))  # padding takes no part
    if group is None or world_size(group) == 1:
        out = attention_on_one_device(q, k, v, scale=scale, visibility=visibility)
    else:
        if strategy == "auto":
            sizes = sizes_of(q, v, shard, group, recomputed=exchange_cache is not None)
            strategy = choose_softmax(sizes, log=shard.rank == 0)
        spec = AttentionSpec(
            group=group, shard=shard, scale=scale, visibility=visibility, exchange_cache=exchange_cache
        )
        out = get_softmax_strategy(strategy)(q, k, v, spec)
    return F.pad(out, (0, 0, 0, 0, 0, padding)).to(v.dtype)


def _check_window(window: int, causal: bool) -> None:
    if isinstance(window, bool) or not isinstance(window, Integral):
        raise ValueError(
            f"sliding_window must be an integer, the tokens that a token sees, got {window!r}; None is no window"
        )
    if window < 1 or not causal:
        raise ValueError(f"sliding_window must be at least 1 and needs causal=True, got {window} with causal={causal}")
