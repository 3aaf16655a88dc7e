"""Ulysses (arXiv 2309.14509): all-to-all from a part of the tokens of all heads to all tokens of a part of the heads.

Attention itself is then that of one device, whatever the mask. Where there are fewer kv heads than ranks, each is
sent to several ranks (as in arXiv 2506.13996), and the gradients of the copies are summed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.softmax_attention import softmax_attention
from ..collectives import all_to_all, self_adjoint
from ..layout import to_rank_order, to_sequence_order
from .strategy import AttentionSpec


def ulysses(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """See `strategy.py`; differentiable as it stands, because the all-to-all is.

    Raises:
        ValueError: the heads cannot be divided among the ranks.
    """
    shard, ranks, tokens = spec.shard, spec.shard.ranks, q.shape[1]
    dims = (q.shape[-1], k.shape[-1], v.shape[-1])
    copies = check_heads(q.shape[2], k.shape[2], ranks)
    k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))  # autograd sums the copies' gradients
    # [B, C, W, the features of a rank's heads]: one message for q, k and v
    message = torch.cat([x.unflatten(2, (ranks, -1)).flatten(3) for x in (q, k, v)], dim=-1)
    message = F.pad(message, (0, 0, 0, 0, 0, shard.local - tokens))
    received = _exchange(message.movedim(2, 0), spec, "of a rank's heads")  # [W, B, C, features]: all tokens
    sequence = to_sequence_order(received.movedim(0, 1), shard.layout, dim=1)[:, : shard.documents[-1]]
    sizes = [x.shape[2] // ranks * x.shape[3] for x in (q, k, v)]
    q, k, v = (x.unflatten(2, (-1, dim)) for x, dim in zip(sequence.split(sizes, dim=-1), dims, strict=True))

    out = softmax_attention(q, k, v, scale=spec.scale, visibility=spec.visibility)  # [B, T, H_q / W, D_v]
    out = F.pad(out.to(v.dtype), (0, 0, 0, 0, 0, ranks * shard.local - out.shape[1]))
    received = _exchange(to_rank_order(out, shard.layout, ranks, dim=1).movedim(1, 0), spec, "of a rank's tokens")
    return received.movedim(0, 2).flatten(2, 3)[:, :tokens]  # [B, C, W, H_q / W, D_v]: the ranks' heads in order


def _exchange(message: Tensor, spec: AttentionSpec, what: str) -> Tensor:
    """An all-to-all, remembered for a recomputation."""
    return self_adjoint(lambda x: all_to_all(x, spec.group).wait(), message, cache=spec.exchange_cache, key=what)


def check_heads(q_heads: int, kv_heads: int, ranks: int) -> int:
    """Return the number of ranks that share a kv head; raise ValueError where the heads cannot be divided."""
    if q_heads % ranks == 0 and kv_heads % ranks == 0:
        return 1
    if q_heads % ranks == 0 and ranks % kv_heads == 0:
        return ranks // kv_heads
    raise ValueError(
        "strategy 'ulysses' divides the heads among the ranks: H_q must be a multiple of W, and H_kv a multiple or a "
        f"divisor of W, got H_q = {q_heads}, H_kv = {kv_heads}, W = {ranks}; use 'lasp2h' or 'ring', or fewer ranks"
    )
