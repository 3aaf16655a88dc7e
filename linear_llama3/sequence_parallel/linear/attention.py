"""Linear attention over a sequence that is sharded over several ranks.

The mathematics is that of one device (`ops`). What is added is the state that enters from the other ranks, by the
exclusive affine scan of (state, decay). Each strategy is one implementation of that scan, in the file that bears its
name. A pass over this rank's tokens, forward or backward, is always

    summary  ->  strategy starts the scan  ->  intra-chunk  ->  wait  ->  output or gradients
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...ops.backends import choose_backend
from ...ops.bidirectional import document_states, read_states
from ...ops.causal_op import passes
from ...ops.checks import check_arguments, check_shapes
from ...ops.linear_attention import divide_by_normalizer, upcast_constant_decay, with_ones_column
from ...ops.linear_attention import linear_attention as attention_on_one_device
from ...ops.precision import without_autocast, working_dtype
from ..collectives import world_size
from ..costs import choose_linear, sizes_of
from ..sequence_shard import SequenceShard, resolve_shard
from .all_scan import all_scan
from .all_to_all import all_to_all_scan
from .document_totals import Scan, document_totals
from .lasp1 import lasp1
from .lasp2 import lasp2
from .state_scan import StateScan, fold, pack

LINEAR_STRATEGIES: dict[str, StateScan] = {
    "lasp1": lasp1,
    "lasp2": lasp2,
    "all_scan": all_scan,
    "all_to_all": all_to_all_scan,
}


def get_linear_strategy(name: str) -> StateScan:
    if name not in LINEAR_STRATEGIES:
        raise ValueError(
            f"the strategy for linear layers must be one of {sorted(LINEAR_STRATEGIES)}, got {name!r}; "
            "register new ones in LINEAR_STRATEGIES"
        )
    return LINEAR_STRATEGIES[name]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None,
    strategy: str = "lasp2",
    layout: str = "contiguous",
    log_decay: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    length: int | None = None,
    backend: str = "auto",
    exchange_cache: MutableMapping[str, Tensor] | None = None,
) -> Tensor:
    """Compute `ops.linear_attention` of the complete sequence, local shards in and out.

    Args:
        q, k, v, log_decay, scale, normalize, causal: as in `ops.linear_attention`, the tokens of this rank:
            `[B, C, H, D]`. A constant decay `[H_kv]` gets this rank's part of its gradient.
        group: the ranks that share the sequence, in order, each with the same number of local tokens (as `shard`
            gives); None or a group of one is plain attention.
        strategy: a name of LINEAR_STRATEGIES, or "auto": the cheapest by the model in `costs.py`.
        layout: a name of LAYOUTS.
        cu_seqlens: document edges of the complete sequence, int `[N + 1]`, for a batch of 1.
        length: true length of the complete sequence, where its tail is padding. Whatever the padding holds changes
            nothing; its outputs are 0.
        backend: "chunked", "triton" or "auto", as in `ops.linear_attention`. "recurrent" is defined on one device only.
        exchange_cache: a mapping that lives as long as this layer's forward pass and its recomputation under
            gradient checkpointing: it keeps the state received first, so that the exchange is not repeated (causal
            only).

    Returns:
        out `[B, C, H_q, D_v]` in the dtype of v.

    Raises:
        ValueError: arguments that do not fit together.
    """
    check_arguments(q, k, v, log_decay=log_decay, causal=causal, backend=backend)  # before anything is sent
    pending = start_linear_attention(
        k, v, group=group, strategy=strategy, layout=layout, log_decay=log_decay, normalize=normalize,
        cu_seqlens=cu_seqlens, causal=causal, length=length, backend=backend, exchange_cache=exchange_cache,
    )  # fmt: skip
    return pending(q, scale)


@without_autocast
def start_linear_attention(
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None,
    strategy: str = "lasp2",
    layout: str = "contiguous",
    log_decay: Tensor | None = None,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    length: int | None = None,
    backend: str = "auto",
    exchange_cache: MutableMapping[str, Tensor] | None = None,
    output_final_state: bool = False,
) -> PendingLinearAttention:
    """Start `linear_attention` before there are queries: send the states of this rank.

    Call the result with the queries: `pending(q, scale=None) -> out`. Work done in between, such as projecting the
    queries, overlaps with the exchange ("lasp2", "all_to_all"; the ring strategies send once the queries are there).

    With `output_final_state`, `pending.final_state` is then the state after this rank's last chunk,
    `[B, H_kv, D_k, D_v]` (+ 1 column with `normalize`); that of the complete sequence is on the rank that holds its
    end (`gather.send_final_state`). It has no gradient, and single documents have no final state.
    """
    if strategy != "auto":
        get_linear_strategy(strategy)
    check_arguments(k, k, v, log_decay=log_decay, causal=causal, backend=backend)
    if backend == "recurrent" and world_size(group) > 1:
        raise ValueError("backend 'recurrent' is defined on one device, got a group of several ranks; use 'chunked'")
    if output_final_state:
        recomputed = exchange_cache is not None
        _check_final_state(k, v, log_decay, packed=cu_seqlens is not None, causal=causal, recomputed=recomputed)
    backend = choose_backend(backend, k, causal=causal)
    shard = resolve_shard(
        k.shape[1], batch=k.shape[0], group=group, layout=layout, cu_seqlens=cu_seqlens, length=length
    )
    keys, values = k[:, : shard.tokens], v[:, : shard.tokens]  # padding takes no part
    decay = upcast_constant_decay(log_decay, k)
    if decay is not None and decay.dim() > 1:
        decay = decay[:, : shard.tokens]
    if group is None or world_size(group) == 1:
        attend: Attend = partial(
            attention_on_one_device, k=keys, v=values, log_decay=decay, normalize=normalize, cu_seqlens=cu_seqlens,
            causal=causal, backend=backend, output_final_state=output_final_state,
        )  # fmt: skip
        return PendingLinearAttention(k, v, shard.tokens, attend)

    values = with_ones_column(values) if normalize else values
    decays = log_decay is not None or shard.packed  # the same on every rank: all send messages of the same size
    if strategy == "auto":
        strategy = choose_linear(sizes_of(k, values, shard, group, decays=decays), log=shard.rank == 0)
    scan = partial(get_linear_strategy(strategy), group=group, chain=shard.layout.chain(shard.ranks))
    if causal:
        sent = _SentStates(
            keys, values, decay, shard=shard, scan=scan, backend=backend, decays=decays, cache=exchange_cache,
            out_dtype=working_dtype(v) if normalize else v.dtype, output_final_state=output_final_state,
        )  # fmt: skip
        attend = sent.attend
    else:
        attend = partial(_attend_bidirectional, k=keys, v=values, shard=shard, scan=scan, group=group)
    return PendingLinearAttention(k, v, shard.tokens, attend, normalize=normalize)


Attend = Callable[..., tuple[Tensor, Tensor | None]]  # (q, scale=) -> out, the final state if asked for


class PendingLinearAttention:
    """Linear attention that waits for its queries."""

    def __init__(self, k: Tensor, v: Tensor, tokens: int, attend: Attend, *, normalize: bool = False) -> None:
        self._k, self._v, self._tokens, self._attend, self._normalize = k, v, tokens, attend, normalize
        self.final_state: Tensor | None = None  # `[B, H_kv, D_k, D_v (+ 1)]` after the call, if it was asked for

    @without_autocast
    def __call__(self, q: Tensor, scale: float | None = None) -> Tensor:
        """Attend with q `[B, C, H_q, D_k]`; out `[B, C, H_q, D_v]` in the dtype of v."""
        check_shapes(q, self._k, self._v)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, self.final_state = self._attend(q[:, : self._tokens], scale=scale)
        out = divide_by_normalizer(out) if self._normalize else out
        return F.pad(out.to(self._v.dtype), (0, 0, 0, 0, 0, q.shape[1] - self._tokens))


class _SentStates:
    """The states of this rank's chunks, on their way to the other ranks."""

    def __init__(
        self, k: Tensor, v: Tensor, log_decay: Tensor | None, *, shard: SequenceShard, scan: Scan, backend: str,
        decays: bool, cache: MutableMapping[str, Tensor] | None, out_dtype: torch.dtype, output_final_state: bool,
    ) -> None:  # fmt: skip
        self.key_dim, self.value_dim = k.shape[-1], v.shape[-1]
        forward, self.backward_pass = passes(backend)
        if backend == "triton":
            from ...ops.triton.launch import pad_head_dims

            k, v, log_decay = pad_head_dims(k, v, log_decay)
        self.k, self.v, self.log_decay, self.scan, self.cache = k, v, log_decay, scan, cache
        self.documents, self.output_final_state = shard.local_documents, output_final_state
        with torch.no_grad():
            self.local = forward(k, v, log_decay, self.documents, out_dtype=out_dtype)
            self.decays = _chunk_decays(k, log_decay, shard) if decays else None
            if cache:  # filled by the pass that is recomputed
                entering = cache["states"]
                self.wait = lambda: entering
            else:
                self.states = self.local.summary()
                self.wait = scan(self.states, self.decays, reverse=False)

    def attend(self, q: Tensor, *, scale: float) -> tuple[Tensor, Tensor | None]:
        if self.k.shape[-1] > self.key_dim:
            q = F.pad(q, (0, self.k.shape[-1] - self.key_dim))
        out, entering = _ShardedLinearAttention.apply(q, self.k, self.v, self.log_decay, self, scale)
        if self.cache is not None:
            self.cache["states"] = entering
        final_state = None
        if self.output_final_state:
            own = pack(self.states, self.decays)[-1]
            final_state = fold(entering[-1], own)[..., : self.key_dim, : self.value_dim]
        return out[..., : self.value_dim], final_state


class _ShardedLinearAttention(torch.autograd.Function):
    """Causal attention of this rank's tokens.

    The forward pass continues what `_SentStates` started with the summary; the backward pass mirrors both.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, sent: _SentStates, scale: float
    ) -> tuple[Tensor, Tensor]:
        intra = sent.local.intra_chunk(q, scale)  # needs no state: runs while the states travel
        entering = sent.wait()  # the states that enter this rank's chunks, `[L, B, H_kv, D_k, D_v]`
        out, _, residuals = sent.local.output(q, scale, entering, intra)
        ctx.save_for_backward(q, k, v, log_decay, sent.decays, *residuals)
        ctx.documents, ctx.scan, ctx.backward_pass, ctx.scale = sent.documents, sent.scan, sent.backward_pass, scale
        entering = entering.detach()  # autograd makes outputs part of its graph, and the cache keeps these
        ctx.mark_non_differentiable(entering)
        return out, entering

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, decays, *residuals = ctx.saved_tensors
        inputs = q, k, v, log_decay, ctx.documents, residuals, d_out, ctx.scale
        local = ctx.backward_pass(*inputs, decay_learns=ctx.needs_input_grad[3])
        wait = ctx.scan(local.summary(), decays, reverse=True)
        intra = local.intra_chunk()  # runs while the gradients of the states travel
        d_leaving = wait()
        d = local.gradients(d_leaving, intra)
        return d.q, d.k, d.v, d.log_decay, None, None


def _chunk_decays(k: Tensor, log_decay: Tensor | None, shard: SequenceShard) -> Tensor:
    """The decay of a state over each chunk `[L, B, H_kv, D_k]`: 0 where a document starts, 1 over no tokens."""
    batch, tokens, heads, key_dim = k.shape
    dtype, chunks = working_dtype(k), shard.chunks
    decays = torch.zeros(len(chunks), batch, heads, key_dim, dtype=dtype, device=k.device)
    for decay, chunk in zip(decays, chunks, strict=True):
        if not chunk.passes_states_through:
            continue
        decay.fill_(1)
        if log_decay is not None and chunk.opening is not None:
            every = log_decay.expand(batch, tokens, heads) if log_decay.dim() == 1 else log_decay
            start, stop = shard.boundaries[chunk.opening : chunk.opening + 2]
            total = every[:, start:stop].sum(1, dtype=torch.float64)
            decay *= total.exp().to(dtype).view(batch, heads, -1)
    return decays


def _attend_bidirectional(
    q: Tensor, *, scale: float, k: Tensor, v: Tensor, shard: SequenceShard, scan: Scan, group: dist.ProcessGroup
) -> tuple[Tensor, None]:
    states = document_totals(document_states(k, v, shard.boundaries), scan=scan, group=group, shard=shard)
    return read_states(q, states, scale=scale, boundaries=shard.boundaries), None


def _check_final_state(*inputs: Tensor | None, packed: bool, causal: bool, recomputed: bool) -> None:
    obstacles = {"cu_seqlens": packed, "causal=False": not causal, "an exchange_cache": recomputed}
    if any(obstacles.values()):
        got = " and ".join(name for name, given in obstacles.items() if given)
        raise ValueError(f"a shard has a final state where every row is one causal sequence, got {got}; leave it out")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise ValueError("the final state of a shard has no gradient, got inputs that need one; use torch.no_grad()")
