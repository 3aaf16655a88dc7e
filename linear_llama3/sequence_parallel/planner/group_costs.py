"""Time and memory of a group by its degree, and the same as integers for the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, inf
from sys import float_info
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .checks import Amount, Size, check_fields

Integers = NDArray[np.int64]
TOKEN_LIMIT = 2**40  # of a group, whatever its memory
COST_UNITS = 2**36  # in a step whose sequences all run one after another; products with weights stay in 63 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal devices that are planned together."""

    devices: int
    memory: float  # bytes of each device that a run may fill

    def __post_init__(self) -> None:
        for name in ("devices", "memory"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of a cluster must be positive, got {getattr(self, name)}")

    def __str__(self) -> str:
        return f"{self.devices} devices with {bytes_text(self.memory)} each"


@dataclass(frozen=True, slots=True, kw_only=True)
class DegreeCosts:
    """Forward and backward pass of a group of one degree, with sequences of lengths s and n tokens in total:

    fixed + sum(per_token s + per_square s^2) seconds and fixed_bytes + bytes_per_token n bytes on each rank.
    """

    fixed: Amount
    per_token: Amount
    per_square: Amount
    fixed_bytes: Amount
    bytes_per_token: Amount
    linear: str = ""  # strategies, of the kinds of layers that there are
    softmax: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "DegreeCosts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs of groups of every degree that may be used; degrees are powers of two. `profile.model_costs` makes them.

    Causal work is assumed even over the ranks of a group, and transfers not hidden behind computation.
    """

    by_degree: Mapping[int, DegreeCosts]
    chunks_per_rank: Size = 1  # of the layout: a group's tokens are padded to a multiple of degree * chunks_per_rank

    def __post_init__(self) -> None:
        check_fields(self, "Costs")
        wrong = [degree for degree in self.by_degree if degree < 1 or degree & (degree - 1)]
        if wrong or not self.by_degree:
            raise ValueError(f"costs need degrees that are powers of two, got {sorted(self.by_degree)}")

    def seconds(self, lengths: Sequence[int], degree: int) -> float:
        """Predicted time of a group with these sequences."""
        c = self.by_degree[degree]
        return c.fixed + sum(c.per_token * s + c.per_square * s * s for s in lengths)

    def memory(self, tokens: int, degree: int) -> float:
        """Bytes on each rank of a group with this number of tokens, padding included."""
        c, multiple = self.by_degree[degree], degree * self.chunks_per_rank
        return c.fixed_bytes + c.bytes_per_token * (-(-tokens // multiple) * multiple)

    def capacity(self, degree: int, memory: float) -> int:
        """Tokens that fit a group whose ranks have `memory` bytes each."""
        c, multiple = self.by_degree[degree], degree * self.chunks_per_rank
        free = memory - c.fixed_bytes
        if free <= 0:
            return 0
        tokens = free / c.bytes_per_token if c.bytes_per_token else inf
        return floor(min(tokens, TOKEN_LIMIT) / multiple) * multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Lengths, degrees and costs of a step as integers, whose sums are exact in any order, on any processor.

    Floating-point sums may round differently on another processor or in another numpy, and ranks would make two plans.
    """

    devices: int
    ids: Integers  # [K] positions in the caller's lengths
    lengths: Integers  # [K], descending
    degrees: Integers  # [D], ascending
    times: Integers  # [K, D] cost of a sequence in a group
    fixed: Integers  # [D] cost of a group
    capacity: Integers  # [D] tokens of a group

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """Sequences that fit a group of a degree `[K, D]`."""
        return self.lengths[:, None] <= self.capacity

    @property
    def work(self) -> Integers:
        """Least cost of a sequence times devices `[K]`."""
        return np.where(self.allowed, self.times * self.degrees, np.iinfo(np.int64).max).min(1)

    def part(self, rows: slice | Integers) -> CostTable:
        """Select some of the sequences."""
        return replace(self, ids=self.ids[rows], lengths=self.lengths[rows], times=self.times[rows])


class Assignment(NamedTuple):
    """A plan of a step as arrays over its G groups and K sequences."""

    micro_batch: Integers  # [G] of a group
    kind: Integers  # [G] column of a group's degree in the table
    group: Integers  # [K] of a sequence

    def loads(self, table: CostTable) -> Integers:
        """Cost of each group `[G]`."""
        load = table.fixed[self.kind]
        np.add.at(load, self.group, table.times[np.arange(len(table)), self.kind[self.group]])
        return load

    def cost(self, table: CostTable) -> int:
        """Sum over the micro-batches of the slowest group's cost."""
        slowest = np.zeros(self.micro_batch.max() + 1, dtype=np.int64)
        np.maximum.at(slowest, self.micro_batch, self.loads(table))
        return int(slowest.sum())


def tabulate(lengths: Sequence[int], cluster: Cluster, costs: Costs) -> CostTable:
    """Tabulate a step; ValueError for lengths that cannot be planned."""
    given = np.asarray(lengths)
    if given.ndim != 1 or len(given) == 0 or given.dtype.kind not in "iu" or given.min() < 1:
        raise ValueError(f"lengths must be one or more positive integers, got {np.array2string(given, threshold=8)}")
    degrees = np.array(sorted(degree for degree in costs.by_degree if degree <= cluster.devices))
    by_degree = [costs.by_degree[degree] for degree in degrees]
    capacity = np.array([costs.capacity(degree, cluster.memory) for degree in degrees])
    order = np.argsort(-given.astype(np.int64), kind="stable")
    ordered = given[order].astype(np.int64)
    _check_longest(int(ordered[0]), degrees, capacity, cluster, costs)

    s = ordered[:, None].astype(np.float64)
    token, square, fixed = np.array([(c.per_token, c.per_square, c.fixed) for c in by_degree], dtype=np.float64).T
    seconds = token * s + square * (s * s)
    slowest = float(seconds.max() * len(ordered) + fixed.max())
    if not COST_UNITS * float_info.min <= slowest < inf:
        raise ValueError(
            f"costs must give a step a finite time above 0, got {slowest} s for {len(ordered)} sequences of up to "
            f"{ordered[0]:,} tokens; give seconds in `DegreeCosts` or the profile"
        )
    unit = slowest / COST_UNITS
    return CostTable(
        devices=cluster.devices,
        ids=order,
        lengths=ordered,
        degrees=degrees,
        times=np.rint(seconds / unit).astype(np.int64),
        fixed=np.rint(fixed / unit).astype(np.int64),
        capacity=capacity,
    )


def _check_longest(longest: int, degrees: Integers, capacity: Integers, cluster: Cluster, costs: Costs) -> None:
    if len(degrees) == 0:
        raise ValueError(
            f"some degree must be no larger than the {cluster.devices} devices, got {sorted(costs.by_degree)}; "
            "take a profile with smaller ones"
        )
    if longest > capacity.max():
        best = degrees[capacity.argmax()]
        need = min(costs.memory(longest, int(degree)) for degree in degrees)
        raise ValueError(
            f"every sequence must fit some group of {cluster}, got one of {longest:,} tokens: it needs "
            f"{bytes_text(need)} on each, and {best} devices hold {capacity.max():,} tokens; leave longer sequences "
            "out or cut them, recompute activations, or plan for more devices or memory"
        )


def bytes_text(size: float) -> str:
    """Format a size for messages: 24.4 KiB, 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
