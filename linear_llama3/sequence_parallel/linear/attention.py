"""Linear attention over a sequence that is spread over several ranks.

The mathematics is that of one device (`ops`); what is added is the state that enters from the other ranks, the
exclusive affine scan of (state, decay). Each strategy is one body of that scan, in the file that bears its name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ...ops.backends import choose_backend
from ...ops.bidirectional import bidirectional_linear_attention
from ...ops.chunked import chunked_linear_attention, send_states
from ...ops.linear_attention import (
    check_arguments,
    check_shapes,
    divide_by_normalizer,
    precise,
    with_ones_column,
)
from ...ops.linear_attention import linear_attention as attention_on_one_device
from ...ops.precision import without_autocast, working_dtype
from ..collectives import world_size
from ..costs import choose_linear, sizes_of
from ..part import Part, locate
from .all_scan import all_scan
from .all_to_all import all_to_all_scan
from .exchange import StateExchange, complete_states
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
        backend: "chunked", "triton" or "auto", as in `ops.linear_attention`. "recurrent" is defined on one device only.
        exchange_cache: a mapping that lives as long as this layer's forward pass and its recomputation under
            gradient checkpointing: the state received first is kept there and not exchanged again (causal only).

    Returns:
        out `[B, C, H_q, D_v]` in the dtype of v.
    """
    check_arguments(q, k, v, log_decay=log_decay, causal=causal, backend=backend)  # before anything is sent
    started = start_linear_attention(
        k, v, group=group, strategy=strategy, layout=layout, log_decay=log_decay, normalize=normalize,
        cu_seqlens=cu_seqlens, causal=causal, length=length, backend=backend, exchange_cache=exchange_cache,
    )  # fmt: skip
    return started(q, scale)


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
) -> StartedAttention:
    """The first half of `linear_attention`, which needs no queries: the states of this rank are sent.

    Call the result with the queries: `started(q, scale=None) -> out`. Work done in between, such as projecting the
    queries, overlaps with the exchange. Another attention in this group first waits for this exchange to finish.

    With `output_final_state`, `started.final_state` is then the state behind this rank's last chunk,
    `[B, H_kv, D_k, D_v]` (+ 1 column with `normalize`); that of the whole sequence is on the rank that holds its end
    (`handover.gather_end`). It has no gradient, and documents have none of their own.
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
    part = locate(k.shape[1], batch=k.shape[0], group=group, layout=layout, cu_seqlens=cu_seqlens, length=length)
    keys, values = k[:, : part.tokens], v[:, : part.tokens]  # padding takes no part
    gate = precise(log_decay, k)
    if gate is not None and gate.dim() > 1:
        gate = gate[:, : part.tokens]
    if world_size(group) == 1:
        attend: Attend = functools.partial(
            _attend_alone, k=keys, v=values, log_decay=gate, normalize=normalize, cu_seqlens=cu_seqlens, causal=causal,
            backend=backend, output_final_state=output_final_state,
        )  # fmt: skip
        return StartedAttention(k, v, part.tokens, attend, normalize=False)

    assert group is not None
    values = with_ones_column(values) if normalize else values
    fades = log_decay is not None or part.packed  # the same on every rank: all send the same message
    if strategy == "auto":
        strategy = choose_linear(sizes_of(k, values, part, group, decays=fades), log=part.rank == 0)
    scan = get_linear_strategy(strategy)
    if causal:
        exchange = StateExchange(
            scan, group, part, fades=fades, cache=exchange_cache, output_final_state=output_final_state
        )
        dtype = working_dtype(v) if normalize else v.dtype
        attend = _start_causal(keys, values, gate, part, exchange, backend, dtype)
    else:
        complete = functools.partial(complete_states, scan=scan, group=group, part=part)
        attend = functools.partial(_attend_unmasked, k=keys, v=values, part=part, complete=complete)
    return StartedAttention(k, v, part.tokens, attend, normalize=normalize)


Attend = Callable[[Tensor, float], tuple[Tensor, Tensor | None]]  # (q, scale) -> out, final state if asked for


class StartedAttention:
    """Linear attention that waits for its queries."""

    def __init__(self, k: Tensor, v: Tensor, tokens: int, attend: Attend, *, normalize: bool) -> None:
        self._k, self._v, self._tokens, self._attend, self._normalize = k, v, tokens, attend, normalize
        self.final_state: Tensor | None = None  # `[B, H_kv, D_k, D_v (+ 1)]` after the call, if it was asked for

    def __call__(self, q: Tensor, scale: float | None = None) -> Tensor:
        """q `[B, C, H_q, D_k]` -> out `[B, C, H_q, D_v]` in the dtype of v."""
        check_shapes(q, self._k, self._v)
        return self._finish(q, q.shape[-1] ** -0.5 if scale is None else scale)

    @without_autocast
    def _finish(self, q: Tensor, scale: float) -> Tensor:
        out, self.final_state = self._attend(q[:, : self._tokens], scale)
        out = divide_by_normalizer(out) if self._normalize else out
        return F.pad(out.to(self._v.dtype), (0, 0, 0, 0, 0, q.shape[1] - self._tokens))


def _check_final_state(*inputs: Tensor | None, packed: bool, causal: bool, recomputed: bool) -> None:
    obstacles = {"cu_seqlens": packed, "causal=False": not causal, "an exchange_cache": recomputed}
    if any(obstacles.values()):
        got = " and ".join(name for name, given in obstacles.items() if given)
        raise ValueError(f"a shard has a final state where every row is one causal sequence, got {got}; leave it out")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise ValueError("the final state of a shard has no gradient, got inputs that need one; use torch.no_grad()")


def _attend_alone(q: Tensor, scale: float, **rest: Any) -> tuple[Tensor, Tensor | None]:
    return attention_on_one_device(q, scale=scale, **rest)


def _start_causal(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    part: Part,
    exchange: StateExchange,
    backend: str,
    dtype: torch.dtype,
) -> Attend:
    """dtype: of the output, where the backend leaves a choice."""
    if backend == "triton":
        from ...ops.triton import attention as triton_attention

        sent = triton_attention.send_states(k, v, log_decay, part.boundaries, exchange)
        return lambda q, scale: (
            triton_attention.sharded_attention(q, k, v, log_decay, sent, scale, dtype), _final_state(exchange, k, v)
        )  # fmt: skip
    wait = send_states(k, v, log_decay, boundaries=part.boundaries, exchange=exchange)
    return lambda q, scale: (
        chunked_linear_attention(
            q, k, v, log_decay, scale=scale, boundaries=part.boundaries, exchange=exchange, wait=wait
        )[0],
        _final_state(exchange, k, v),
    )


def _final_state(exchange: StateExchange, k: Tensor, v: Tensor) -> Tensor | None:
    """Known after the attention; without the rows and columns that the kernels add."""
    state = exchange.final_state
    return None if state is None else state[..., : k.shape[-1], : v.shape[-1]]


def _attend_unmasked(
    q: Tensor, scale: float, *, k: Tensor, v: Tensor, part: Part, complete: Callable[[Tensor], Tensor]
) -> tuple[Tensor, None]:
    out, _ = bidirectional_linear_attention(q, k, v, scale=scale, boundaries=part.boundaries, complete=complete)
    return out, None
