"""What the exchange of linear states looks like from inside the ops: the states that enter, or the completed ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..collectives import all_reduce
from ..part import Part
from .scan import Scan, fold, pack


class StateExchange:
    """The other ranks, as the ops see them (`ops.exchange.Exchange`)."""

    def __init__(
        self,
        scan: Scan,
        group: dist.ProcessGroup,
        part: Part,
        *,
        fades: bool,
        cache: MutableMapping[str, Tensor] | None,
        output_final_state: bool = False,
    ) -> None:
        self.scan, self.group, self.chain, self.cache = scan, group, part.layout.chain(part.ranks), cache
        self.links, self.fades = part.links, fades
        self.output_final_state = output_final_state
        self.final_state: Tensor | None = None  # if asked for: what leaves the last link, once states have arrived

    def start(self, summarize: Callable[[], tuple[Tensor, Tensor]], *, reverse: bool) -> Callable[[], Tensor]:
        cache = None if reverse else self.cache
        if cache is not None and "states" in cache:
            return lambda: cache["states"]
        finish_started(self.group)
        states, factors = summarize()
        sent = factors if self.fades else None
        own = pack(states[-1], None if sent is None else sent[-1]) if self.output_final_state else None
        wait = functools.cache(self.scan(states, sent, group=self.group, chain=self.chain, reverse=reverse))
        _under_way[self.group] = wait

        def finish() -> Tensor:
            if _under_way.get(self.group) is wait:
                del _under_way[self.group]
            received = wait()
            if own is not None:
                self.final_state = fold(received[-1], own)
            return received if cache is None else cache.setdefault("states", received)

        return finish


_under_way: dict[dist.ProcessGroup, Callable[[], Tensor]] = {}


def finish_started(group: dist.ProcessGroup) -> None:
    """Complete the last exchange that was started in `group`, if its queries have not arrived yet.

    Messages between two ranks are matched by their order only, and after an error the queries may never arrive.
    """
    if (wait := _under_way.pop(group, None)) is not None:
        wait()


def complete_states(states: Tensor, *, scan: Scan, group: dist.ProcessGroup, part: Part) -> Tensor:
    """From the states of this rank's pieces of documents `[N, B, H, D_k, D_v]` to those of the whole documents.

    Without a mask every token reads all of its document: a sum over ranks (Algorithm 1, with the sum of the
    backward pass over ALL ranks). A sum has no order: one document is an all-reduce whatever the strategy. Of packed
    ones only the first and the last piece of a link can go on elsewhere, in two scans. The map is symmetric, so its
    gradient is the map itself.
    """
    return _CompleteStates.apply(states, scan, group, part)


class _CompleteStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, scan: Scan, group: dist.ProcessGroup, part: Part) -> Tensor:
        ctx.scan, ctx.group, ctx.part = scan, group, part
        return _complete(states, scan, group, part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _complete(grad, ctx.scan, ctx.group, ctx.part), None, None, None


def _complete(states: Tensor, scan: Scan, group: dist.ProcessGroup, part: Part) -> Tensor:
    finish_started(group)
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
