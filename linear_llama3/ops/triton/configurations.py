"""Tile sizes, warps and pipeline stages, by shape and architecture.

A pure function of what every rank knows, so all ranks round alike and nothing is tuned in a user's first step. The
choices spill no registers (`scripts/kernel_report.py`; a test holds it) and prefer few bytes to many programs.
"""

from __future__ import annotations

from typing import NamedTuple

from .tiles import CHANNEL, HEAD, NONE, SCALAR


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


def configuration(gate: int, K: int, V: int, *, wide: bool, decay_gradient: bool, capability: int) -> Configuration:
    """`wide`: products in float32 (tf32) instead of bfloat16. `capability`: 80, 90, ..."""
    BK, BV = power_of_two(K), power_of_two(V)
    hopper = 90 <= capability < 120  # 120 are consumer GPUs, with the products of 80
    if wide:
        return _wide(gate, BK, BV, decay_gradient, hopper, masked=(BK, BV) != (K, V))
    return _hopper(gate, BK, BV, decay_gradient) if hopper else _ampere(gate, BK, BV, decay_gradient)


def power_of_two(n: int) -> int:
    """The tile that holds n columns; tensor cores want 16 at least."""
    return max(16, 1 << (n - 1).bit_length())


def _hopper(gate: int, BK: int, BV: int, decay_gradient: bool) -> Configuration:
    """Warpgroup products take 64 rows. Fewer stored states are fewer bytes: one for 128 tokens if registers allow."""
    output = Tiles(BK, min(BV, 64), min(BK, 64), 4, 2)
    if gate == CHANNEL:
        output = Tiles(BK, min(BV, 64), min(BK, 32), 4, 2)
    elif gate != NONE and BK == 128:
        output = Tiles(BK, min(BV, 64), 128, 8, 2)
    if BK == 256:
        output = Tiles(BK, min(BV, 32), 16 if gate == CHANNEL else 64, 8, 1 if gate == SCALAR else 2)

    small = gate == CHANNEL or (gate == HEAD and BK == 256)
    scan = Tiles(min(BK, 64 if small else 128), min(BV, 64), 0, 4, 3 if BK >= 64 else 2)
    if gate == CHANNEL:
        return Configuration(64, 64, scan, output, Tiles(min(BK, 32), min(BV, 64), min(BK, BV, 32), 8, 1))
    if gate == SCALAR or decay_gradient:
        return Configuration(64, 64, scan, output, Tiles(min(BK, 128), min(BV, 128), min(BK, BV, 64), 8, 2))
    stages = 2 if gate == NONE else 1
    return Configuration(64, 128, scan, output, Tiles(min(BK, 64), min(BV, 64), min(BK, BV, 32), 8, stages))


def _ampere(gate: int, BK: int, BV: int, decay_gradient: bool) -> Configuration:
    """Also for consumer GPUs, whose multiprocessors have 99 KiB of shared memory."""
    big = BK == 256 or (gate == CHANNEL and BK == 128)
    reads = min(BK, 64) if gate != CHANNEL else min(BK, 16 if BK == 256 else 32)
    output = Tiles(BK, min(BV, 32 if gate == CHANNEL and BK == 256 else 64), reads, 8 if big else 4, 2)
    scan = Tiles(min(BK, 64 if gate != NONE and BK == 256 else 128), min(BV, 64), 0, 4, 2)
    if BK == 256 and gate in (HEAD, SCALAR):
        scan = scan._replace(stages=1)
    if gate == CHANNEL:
        return Configuration(32, 32, scan, output, Tiles(min(BK, 64), min(BV, 128), min(BK, BV, 64), 8, 2))
    if BK == 256 and (gate == SCALAR or decay_gradient):
        return Configuration(32, 32, scan, output, Tiles(64, min(BV, 64), min(BV, 32), 4, 1))
    return Configuration(32, 32, scan, output, Tiles(min(BK, 128), min(BV, 128), min(BK, BV, 64), 4, 2))


def _wide(gate: int, BK: int, BV: int, decay_gradient: bool, hopper: bool, masked: bool) -> Configuration:
    """Products of float32 are three of tf32: 16 tokens, or 32 where the backward pass has registers for them. Tiles
    that the head dims do not fill are read through masks, which take registers too."""
    keys = min(BK, 64) if BK == 256 and (gate == CHANNEL or not hopper) else min(BK, 128)
    columns, reads = 64 if hopper else 32 if keys <= 64 else 16, 64
    if gate == CHANNEL:
        columns, reads = min(columns, 32), 32
    elif keys == 128 and not hopper:
        reads = 32 if gate == NONE else 16
    columns = max(columns // 2, 16) if masked else columns
    output = Tiles(keys, min(BV, columns), min(BK, reads), 8, 1)

    scan = Tiles(min(BK, 64), min(BV, 64), 0, 8, 1) if hopper else Tiles(min(BK, 64), min(BV, 64), 0, 4, 2)
    if BK == 16:
        scan = scan._replace(warps=4, stages=1)
    elif gate == CHANNEL and BK == 64:
        scan = scan._replace(warps=8)
    if not masked and (gate == NONE or (gate == HEAD and hopper and not decay_gradient)):
        return Configuration(16, 32, scan, output, Tiles(min(BK, 128), min(BV, 128), min(BK, BV, 32), 8, 2))
    stages = 2 if decay_gradient and gate != CHANNEL and min(BK, BV) >= 64 else 1
    return Configuration(16, 16, scan, output, Tiles(min(BK, 64), min(BV, 64), min(BK, BV, 32), 8, stages))
