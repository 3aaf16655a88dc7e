"""Counting what a rank sends, at the last moment before the communication library.

with Traffic() as traffic:
    loss = model(**local).loss
    loss.backward()
print(traffic.messages, traffic.bytes)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What a rank sends in a collective of W ranks, as a multiple of its input: every part to every rank that needs it.
_SHARES: Mapping[str, Callable[[int], float]] = {
    "all_gather": lambda ranks: ranks - 1,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,  # a reduce-scatter and an all-gather
    "all_to_all": lambda ranks: (ranks - 1) / ranks,
    "send": lambda ranks: 1,
}
_OPERATORS = {  # operator of torch.ops.c10d -> (name, position of the input)
    "_allgather_base_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send", 0),
}


class Traffic(TorchDispatchMode):
    """Collectives and messages that this thread starts inside the `with` block, whatever code starts them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: Counter[str] = Counter()  # by kind of collective; "send" for messages between two ranks
        self.bytes = 0.0  # sent by this rank

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name in _OPERATORS:
            kind, position = _OPERATORS[name]
            given = args[position]
            tensors = [given] if isinstance(given, Tensor) else list(given)
            group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject) and _is_group(x))
            self.messages[kind] += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors) * _SHARES[kind](group.size())
        return func(*args, **(kwargs or {}))


def _is_group(x: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(x._type())
