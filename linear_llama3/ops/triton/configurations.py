"""Tile sizes, warps and pipeline stages, by shape and architecture.

A pure function of what every rank knows: all ranks round alike, nothing is tried out in a user's first step, and the
same choice is compiled by `report.py`, whose test holds that none spills registers.
"""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    BK: int  # columns of keys,
    BV: int  # and of values, that one program holds
    BC: int  # columns that are read at a time where all are summed over
    warps: int
    stages: int


class Configuration(NamedTuple):
    rows: int  # tokens of a chunk in the forward pass,
    chunk: int  # and in the backward pass, which stores a state for each
    scan: Tiles
    output: Tiles
    backward: Tiles


def power_of_two(n: int) -> int:
    """The tile that holds n columns; tensor cores want 16 at least."""
    return max(16, 1 << (n - 1).bit_length())


def configuration(gate: int, K: int, V: int, *, wide: bool, gate_gradient: bool, capability: int) -> Configuration:
    """`wide`: products in float32 (tf32) instead of bfloat16. `capability`: 80, 90, ..."""
    BK, BV = power_of_two(K), power_of_two(V)
    return Configuration(
        rows=64,
        chunk=64,
        scan=Tiles(min(BK, 64), min(BV, 64), 0, 4, 2),
        output=Tiles(BK, min(BV, 64), min(BK, 32), 4, 2),
        backward=Tiles(min(BK, 64), min(BV, 64), 32, 4, 2),
    )
