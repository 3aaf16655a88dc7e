"""Linear attention over a sequence that is spread over several ranks.

The mathematics is that of one device (`ops`); what is added is the state that enters from the other ranks, the
exclusive affine scan of (state, decay). Each strategy is one body of that scan, in the file that bears its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...ops.bidirectional import bidirectional_linear_attention
from ...ops.chunked import chunked_linear_attention
from ...ops.linear_attention import check_arguments, divide_by_normalizer, with_ones_column
from ...ops.linear_attention import linear_attention as attention_on_one_device
from ...ops.precision import without_autocast
from ..collectives import all_reduce, world_size
from ..costs import choose_linear, sizes_of
from ..part import Part, locate
from .all_scan import all_scan
from .all_to_all import all_to_all_scan
from .lasp1 import lasp1
from .lasp2 import lasp2
from .scan import Scan

LINEAR_STRATEGIES: dict[str, Scan] = {
    "lasp1": lasp1,
    "lasp2": lasp2,
    "all_scan": all_scan,
    "all_to_all": all_to_all_scan,
}


def get_linear_strategy(name: str) -> Scan:
    if name not in LINEAR_STRATEGIES:
        raise ValueError(
            f"the strategy for linear layers must be one of {sorted(LINEAR_STRATEGIES)}, got {name!r}; "
            "register new ones in LINEAR_STRATEGIES"
        )
    return LINEAR_STRATEGIES[name]


@without_autocast
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
    exchange_cache: dict[str, Tensor] | None = None,
) -> Tensor:
    """`ops.linear_attention` of the whole sequence, local shards in and out.

    Args:
        q, k, v, log_decay, scale, normalize, causal: as in `ops.linear_attention`, the tokens of this rank:
            `[B, C, H, D]`. A constant decay `[H_kv]` gets this rank's part of its gradient.
        group: the ranks that share the sequence, in order, each with as many local tokens (as `shard` gives);
            None or a group of one is plain attention.
        strategy: a name of LINEAR_STRATEGIES, or "auto": the cheapest by the model in `costs.py`.
        layout: a name of LAYOUTS.
        cu_seqlens: document edges of the whole sequence, int `[N + 1]`, for a batch of 1.
        length: true length of the whole sequence, where its tail is padding. Whatever the padding holds changes
            nothing; its outputs are 0.
        backend: "chunked" or "auto". "recurrent" is defined on one device only.
        exchange_cache: a dict that lives as long as this layer's forward pass and its recomputation under
            gradient checkpointing: the state received first is kept there and not exchanged again.

    Returns:
        out `[B, C, H_q, D_v]` in the dtype of v.
    """
    if strategy != "auto":
        get_linear_strategy(strategy)
    log_decay, _ = check_arguments(q, k, v, log_decay=log_decay, cu_seqlens=None, causal=causal, backend=backend)
    if backend == "recurrent" and world_size(group) > 1:
        raise ValueError("backend 'recurrent' is defined on one device, got a group of several ranks; use 'chunked'")
    local = q.shape[1]
    part = locate(local, batch=q.shape[0], group=group, layout=layout, cu_seqlens=cu_seqlens, length=length)
    q, k, v = (x[:, : part.tokens] for x in (q, k, v))  # padding takes no part
    if log_decay is not None and log_decay.dim() > 1:
        log_decay = log_decay[:, : part.tokens]
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    if world_size(group) == 1:
        out, _ = attention_on_one_device(
            q,
            k,
            v,
            log_decay=log_decay,
            scale=scale,
            normalize=normalize,
            cu_seqlens=cu_seqlens,
            causal=causal,
            backend=backend,
        )
    else:
        assert group is not None
        values = with_ones_column(v) if normalize else v
        fades = log_decay is not None or part.packed  # the same on every rank: all send the same message
        if strategy == "auto":
            strategy = choose_linear(sizes_of(q, values, part, group, decays=fades), log=part.rank == 0)
        scan = get_linear_strategy(strategy)
        if causal:
            exchange = StateExchange(scan, group, part, fades=fades, cache=exchange_cache)
            out, _ = chunked_linear_attention(
                q, k, values, log_decay, scale=scale, boundaries=part.boundaries, exchange=exchange
            )
        else:
            complete = lambda states: _CompleteStates.apply(states, scan, group, part)  # noqa: E731
            out, _ = bidirectional_linear_attention(
                q, k, values, scale=scale, boundaries=part.boundaries, complete=complete
            )
        out = divide_by_normalizer(out) if normalize else out
    return F.pad(out.to(v.dtype), (0, 0, 0, 0, 0, local - part.tokens))


class StateExchange:
    """The other ranks, as `ops.chunked` sees them (its `Exchange`)."""

    def __init__(
        self,
        scan: Scan,
        group: dist.ProcessGroup,
        part: Part,
        *,
        fades: bool,
        cache: dict[str, Tensor] | None,
    ) -> None:
        self.scan, self.group, self.chain, self.cache = scan, group, part.layout.chain(part.ranks), cache
        self.links, self.fades = part.links, fades

    def start(self, summarize: Callable[[], tuple[Tensor, Tensor]], *, reverse: bool) -> Callable[[], Tensor]:
        cache = None if reverse else self.cache
        if cache is not None and "states" in cache:
            return lambda: cache["states"]
        states, factors = summarize()
        sent = factors if self.fades else None
        wait = self.scan(states, sent, group=self.group, chain=self.chain, reverse=reverse)
        if cache is None:
            return wait
        return lambda: cache.setdefault("states", wait())


class _CompleteStates(torch.autograd.Function):
    """From the states of this rank's pieces of documents `[N, B, H, D_k, D_v]` to those of the whole documents.

    Without a mask every token reads all of its document: a sum over ranks (Algorithm 1, with the sum of the
    backward pass over ALL ranks). A sum has no order: one document is an all-reduce whatever the strategy. Of packed
    ones only the first and the last piece of a link can go on elsewhere, in two scans. The map is symmetric, so its
    gradient is the map itself.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, scan: Scan, group: dist.ProcessGroup, part: Part) -> Tensor:
        ctx.scan, ctx.group, ctx.part = scan, group, part
        return _complete(states, scan, group, part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _complete(grad, ctx.scan, ctx.group, ctx.part), None, None, None


def _complete(states: Tensor, scan: Scan, group: dist.ProcessGroup, part: Part) -> Tensor:
    if not part.packed:
        return all_reduce(states.sum(0), group).wait().expand_as(states)
    nothing = torch.zeros_like(states[0])
    opening, closing, factors = [], [], []
    for first, stop, left_open in part.links:
        opening.append(states[first] if left_open else nothing)
        closing.append(states[stop - 1] if stop > first else nothing)
        passes = first == stop or (stop - first == 1 and left_open)  # no document starts here
        factors.append(torch.full_like(nothing[..., 0], float(passes)))
    chain, factor = part.layout.chain(part.ranks), torch.stack(factors)
    # one after the other: a scan is a chain of messages, and two of them could wait for each other
    from_left = scan(torch.stack(closing), factor, group=group, chain=chain, reverse=False)()
    from_right = scan(torch.stack(opening), factor, group=group, chain=chain, reverse=True)()
    states = states.clone()
    for i, (first, stop, left_open) in enumerate(part.links):
        if left_open:
            states[first] += from_left[i]
        if stop > first:
            states[stop - 1] += from_right[i]
    return states
