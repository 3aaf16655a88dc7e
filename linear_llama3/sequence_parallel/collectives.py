"""The only file that calls torch.distributed collectives. All are asynchronous: start now, `wait` for the result."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch 2.13 renamed the single-tensor collectives and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, slots=True)
class Pending:
    """A collective in flight."""

    result: Tensor
    work: Any
    sent: Tensor  # kept alive until the collective has read it

    def wait(self) -> Tensor:
        self.work.wait()
        return self.result


def check_group(group: dist.ProcessGroup | None) -> None:
    """Raise ValueError unless `group` is None or a group of ranks that includes this process."""
    if group is None or isinstance(group, dist.ProcessGroup):
        return
    if group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group gives to the processes outside
        raise ValueError(
            f"group must hold this process, got one without global rank {dist.get_rank()}; give every process the "
            "group that it is in, or None to keep complete sequences"
        )
    raise ValueError(
        f"group must be a ProcessGroup or None, got a {type(group).__name__}; make one with "
        "torch.distributed.new_group, or take that of a mesh axis with mesh.get_group()"
    )


def world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in `group`, a user's perhaps; None is a group of one."""
    check_group(group)
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank inside `group` (not its global rank)."""
    return 0 if group is None else dist.get_rank(group)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Gather `x` of every rank, `[W, *x.shape]`."""
    x = x.contiguous()
    flat = torch.empty(world_size(group) * x.numel(), dtype=x.dtype, device=x.device)
    work = _all_gather(flat, x.view(-1), group=group, async_op=True)
    return Pending(flat.view(-1, *x.shape), work, x)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Sum `x` `[W, ...]` over ranks; rank r receives the part `[r]`."""
    x = x.contiguous()
    flat = torch.empty(x[0].numel(), dtype=x.dtype, device=x.device)
    work = _reduce_scatter(flat, x.view(-1), op=dist.ReduceOp.SUM, group=group, async_op=True)
    return Pending(flat.view(x.shape[1:]), work, x)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Sum `x` over ranks, on every rank."""
    x = x.clone(memory_format=torch.contiguous_format)
    return Pending(x, dist.all_reduce(x, op=dist.ReduceOp.SUM, group=group, async_op=True), x)


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Exchange parts of `x` `[W, ...]`: rank r receives the part `[r]` of every rank, `[W, ...]` in rank order."""
    x = x.contiguous()
    result = torch.empty_like(x)
    return Pending(result, dist.all_to_all_single(result, x, group=group, async_op=True), x)


def self_adjoint(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    cache: MutableMapping[str, Any] | None = None,
    key: str = "received",
) -> Tensor:
    """Apply a linear map that is its own gradient, such as an all-reduce or an all-to-all, differentiably.

    If `cache` holds a result under `key`, nothing is sent; otherwise the result is stored there.
    """
    return _SelfAdjoint.apply(x, function, cache, key)


class _SelfAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], cache: MutableMapping[str, Any] | None, key: str
    ) -> Tensor:
        ctx.function = function
        if cache is None:
            return function(x)
        if key not in cache:
            cache[key] = function(x)
        return cache[key].detach()  # autograd makes what is returned part of its graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.function(grad), None, None, None


@lru_cache(maxsize=64)  # one call per group
def number_of_nodes(group: dist.ProcessGroup, device: torch.device) -> int:
    """Count the machines, by name, of the ranks of `group`. A collective call; every rank gets the same result."""
    return len(set(_hashes(platform.node().encode(), group, device)))


def fingerprints(x: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Hash shape and content of every rank's `x`. A collective call; every rank gets the same result."""
    content = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _hashes(repr(tuple(x.shape)).encode() + content.tobytes(), group, x.device)


def _hashes(content: bytes, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    own = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)
    return all_gather(torch.tensor([own], device=device), group).wait().flatten().tolist()


@dataclass(frozen=True, slots=True)
class Transfer:
    """Messages between pairs of ranks in flight."""

    received: tuple[Tensor, ...]
    works: list[Any]
    sent: tuple[Tensor, ...]  # kept alive until they are read

    def wait(self) -> tuple[Tensor, ...]:
        while self.works:  # each once: gloo would wait for a second message
            self.works.pop(0).wait()
        return self.received


def send_receive(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group: dist.ProcessGroup
) -> Transfer:
    """Send every tensor to a rank of `group`, and fill every (contiguous) tensor with the message of a rank.

    Messages of one pair of ranks are matched in order. Empty tensors do not travel. All ranks that exchange
    anything must go through their calls in one order, in which every message is sent and received.
    """
    sends = [(x.contiguous(), rank) for x, rank in sends]
    operations = [(dist.isend, x, rank) for x, rank in sends] + [(dist.irecv, x, rank) for x, rank in receives]
    messages = [dist.P2POp(op, x, group=group, group_peer=rank) for op, x, rank in operations if x.numel()]
    works = dist.batch_isend_irecv(messages) if messages else []
    return Transfer(tuple(x for x, _ in receives), list(works), tuple(x for x, _ in sends))
