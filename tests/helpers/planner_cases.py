"""Random steps with random costs, and all their plans by plain enumeration: none of this calls the planner."""

from __future__ import annotations

from functools import cache
from math import inf

import numpy as np

from linear_llama3.sequence_parallel.planner import Cluster, Costs, DegreeCosts

Case = tuple[list[int], Cluster, Costs]


def random_case(seed: int, *, sequences: int, devices: int, tightest: float = 1.3) -> Case:
    """Long-tailed lengths; costs of computing and of links that get slower; memory for a part of them or for all."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(6, 1.2, sequences).astype(int) + 1, 20000)
    square, fixed, gathers = rng.choice([0, 1e-5, 1e-3]), rng.choice([0, 0.5, 5]), rng.choice([0, 0.02])
    node, slow, state = rng.choice([1, 2, 8]), rng.choice([0, 0.3, 2]), rng.choice([0, 0.01, 0.2])
    costs = {}
    for bit in range(devices.bit_length()):
        degree = 1 << bit
        link = 0 if degree == 1 else 0.05 if degree <= node else slow
        costs[degree] = DegreeCosts(
            fixed=float(fixed + state * (degree - 1)),
            per_token=1e-3 * (1 / degree + link * (1 - 1 / degree) / degree),
            per_square=float(square * 1e-3 / degree),
            fixed_bytes=10.0 + 3 * (degree > 1),
            bytes_per_token=1 / degree + float(gathers * (degree > 1)),
        )
    chunks = int(rng.choice([1, 2]))
    share = rng.uniform(0.3, 2) if sequences > devices else rng.uniform(tightest, 4)
    longest = lengths.max() * costs[1 << (devices.bit_length() - 1)].bytes_per_token
    memory = 14 + 2 * chunks + max(longest, share * lengths.sum() / devices)
    return (
        lengths.tolist(),
        Cluster(devices=devices, memory=float(memory)),
        Costs(by_degree=costs, chunks_per_rank=chunks),
    )


def seconds(lengths: list[int], degree: int, costs: Costs) -> float:
    c = costs.by_degree[degree]
    return c.fixed + sum(c.per_token * s for s in lengths) + sum(c.per_square * s**2 for s in lengths)


def fits(lengths: list[int], degree: int, cluster: Cluster, costs: Costs) -> bool:
    """A group's tokens in equal shares for its ranks, each of them padded to full chunks."""
    chunks = degree * costs.chunks_per_rank
    padded = sum(lengths) + -sum(lengths) % chunks
    c = costs.by_degree[degree]
    return c.fixed_bytes + c.bytes_per_token * padded <= cluster.memory * (1 + 1e-12)


def fastest(case: Case, *, micro_batches: int | None = None, degree: int | None = None) -> float:
    """Seconds of the best of all plans; inf if there is none. Every sequence, as a bit, in every group.

    Args:
        micro_batches: their number; None: any.
        degree: of all groups; None: any degrees.
    """
    lengths, cluster, costs = case
    everything = (1 << len(lengths)) - 1

    def parts(members: int) -> list[int]:
        found, part = [], members
        while part:
            found.append(part)
            part = (part - 1) & members
        return found

    @cache
    def group(members: int, size: int) -> float:
        own = [s for n, s in enumerate(lengths) if members >> n & 1]
        return seconds(own, size, costs) if fits(own, size, cluster, costs) else inf

    @cache
    def groups(members: int, devices: int, largest: int) -> float:
        """Seconds of these sequences on this number of devices, in groups no larger than `largest`."""
        if not members or not devices:
            return inf if members or devices else 0.0
        best = inf
        for size in costs.by_degree:
            if size <= min(devices, largest) and degree in (None, size):
                for part in parts(members):
                    own = group(part, size)
                    if own < best:
                        best = min(best, max(own, groups(members ^ part, devices - size, size)))
        return best

    @cache
    def step(members: int, count: int | None) -> float:
        if not members or count == 0:
            return 0.0 if not members and not count else inf
        lowest = members & -members
        following = None if count is None else count - 1
        return min(
            groups(part, cluster.devices, cluster.devices) + step(members ^ part, following)
            for part in parts(members)
            if part & lowest
        )

    return step(everything, micro_batches)
