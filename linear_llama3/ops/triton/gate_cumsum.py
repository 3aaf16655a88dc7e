"""The cumulated log decay of every chunk."""

import triton
import triton.language as tl

from .tiles import LOG2E, bounded, load_tile, store_tile


@triton.jit
def gate_cumsum_kernel(
    log_decay, b, chunks, tokens, WIDTH: tl.constexpr, BW: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """`b_i = log2(e) * sum_{j <= i} g_j` inside each chunk; log_decay and b (float32) `[B, T, WIDTH]`.

    Grid: (chunks, WIDTH / BW, B).
    """
    start, stop = tl.load(chunks + 2 * tl.program_id(0)), tl.load(chunks + 2 * tl.program_id(0) + 1)
    columns = tl.program_id(1) * BW + tl.arange(0, BW)
    at = (tl.cast(tl.program_id(2), tl.int64) * tokens + start) * WIDTH
    g = load_tile(log_decay + at, stop - start, columns, WIDTH, WIDTH, C, tl.float32)
    g = bounded(g * LOG2E)
    store_tile(b + at, tl.cumsum(g, axis=0), stop - start, columns, WIDTH, WIDTH, C)
