"""RSA's sparse variant with Linformer (arXiv 2105.13120, section 4; Linformer: 2006.04768): p keys instead of T.

Two matrices `[p, T]`, E and F, mix the tokens of the complete sequence into p keys and p values. A rank holds the
columns of its own tokens, projects its own keys and values, and one all-reduce of each sum replaces both rings.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ...ops.checks import check_shapes
from ...ops.precision import without_autocast, working_dtype
from ..collectives import all_reduce, self_adjoint, world_size
from ..sequence_shard import resolve_shard


@without_autocast
def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    *,
    group: dist.ProcessGroup | None,
    layout: str = "contiguous",
    scale: float | None = None,
    causal: bool = False,
    length: int | None = None,
) -> Tensor:
    """Bidirectional attention to linear projections of all keys and values, local shards in and out.

    Args:
        q: `[B, C, H_q, D]`, the tokens of this rank.
        k: `[B, C, H_kv, D]`, H_q a multiple of H_kv.
        v: `[B, C, H_kv, D_v]`.
        key_projection: E, this rank's columns `[p, C]` (`shard(E, dim=1)`); their gradient is complete.
        value_projection: F, this rank's columns `[p, C]`; their gradient is complete.
        group, layout, scale, length: as in `softmax_attention`.
        causal: must be False.

    Returns:
        out `[B, C, H_q, D_v]` in the dtype of v, 0 at padding.

    Raises:
        ValueError: causal=True, because every projected key mixes in tokens of the future.
    """
    if causal:
        raise ValueError(
            "linformer_attention mixes every token into every key, which shows a causal model the future, got "
            "causal=True; use it in bidirectional models, and softmax_attention in causal ones"
        )
    check_shapes(q, k, v)
    for name, x in (("key_projection", key_projection), ("value_projection", value_projection)):
        if x.dim() != 2 or x.shape[1] != q.shape[1]:
            raise ValueError(f"{name} must be this rank's columns [p, C = {q.shape[1]}], got shape {tuple(x.shape)}")
    if key_projection.shape[0] != value_projection.shape[0]:
        raise ValueError(
            "key_projection and value_projection must have the same number of rows, got "
            f"{key_projection.shape[0]} and {value_projection.shape[0]}"
        )
    shard = resolve_shard(q.shape[1], batch=q.shape[0], group=group, layout=layout, cu_seqlens=None, length=length)
    work, tokens, kv_heads = working_dtype(q), shard.tokens, k.shape[2]
    query, key, value = (x[:, :tokens].to(work) for x in (q, k, v))
    keys = torch.einsum("pn,bnhd->bhpd", key_projection[:, :tokens].to(work), key)
    values = torch.einsum("pn,bnhd->bhpd", value_projection[:, :tokens].to(work), value)
    if group is not None and world_size(group) > 1:
        # every rank uses the sums for its own queries: the gradient of a summand is a sum over ranks as well
        keys, values = (self_adjoint(lambda x: all_reduce(x, group).wait(), x) for x in (keys, values))
    query = query.unflatten(2, (kv_heads, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    p = torch.einsum("bnhgd,bhpd->bnhgp", query, keys).softmax(-1)
    out = torch.einsum("bnhgp,bhpd->bnhgd", p, values).flatten(2, 3)
    return F.pad(out, (0, 0, 0, 0, 0, q.shape[1] - tokens)).to(v.dtype)
