"""The affine merge: states and decays of pieces of a sequence, folded in order."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NOTHING, ZERO, CONTINUE = -1, -1, -2


class MergeStep(NamedTuple):
    """One step: set X to its start, store it, and fold a piece into it."""

    fold: int = NOTHING  # the piece to fold
    store: int = NOTHING  # where X goes before that
    start: int = CONTINUE  # with X, from ZERO, or from the initial state of this number


def merge_steps(steps: Iterable[MergeStep], device: torch.device) -> Tensor:
    """The steps as int32 `[n, 3]`. The copy to a device waits for it: build once and keep."""
    return torch.tensor(list(steps), dtype=torch.int32).view(-1, 3).to(device)


STEP_CONTINUE = tl.constexpr(CONTINUE)


@triton.jit
def merge_kernel(
    states, decays, initial, entering, steps, count,
    state_piece, state_batch, state_row, decay_piece, decay_batch, decay_row,
    initial_piece, initial_batch, entering_piece, entering_batch,
    ROWS: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    DECAYS: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """`X <- a * X + S` from piece to piece, each receiving the X before it; the same between the segments of one
    device and between the links of many.

    States and initial are matrices `[ROWS = H * K, V]`, decays `[ROWS]`, one for every piece and batch row, at the
    strides named. steps int32 `[count, 3]`: source, target and start of every `MergeStep`.
    Grid: (ROWS / BR, V / BV, B).
    """
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    batch = tl.cast(tl.program_id(2), tl.int64)
    inside = columns[None, :] < V
    dense = rows[:, None] * V + columns[None, :]
    x = tl.zeros([BR, BV], dtype=states.dtype.element_ty)
    for n in range(count):
        source, target, start = tl.load(steps + 3 * n), tl.load(steps + 3 * n + 1), tl.load(steps + 3 * n + 2)
        # all rows, or none where there is no source, target or start
        folded, sent = tl.where(source >= 0, ROWS, 0), tl.where(target >= 0, ROWS, 0)
        if INITIAL:
            given_rows = tl.where(start >= 0, ROWS, 0)
            at = initial + tl.cast(start, tl.int64) * initial_piece + batch * initial_batch
            given = tl.load(at + dense, mask=(rows[:, None] < given_rows) & inside, other=0.0).to(x.dtype)
            x = tl.where(start == STEP_CONTINUE, x, given)
        else:
            x = tl.where(start == STEP_CONTINUE, x, 0.0)
        at = entering + tl.cast(target, tl.int64) * entering_piece + batch * entering_batch
        tl.store(at + dense, x, mask=(rows[:, None] < sent) & inside)
        if DECAYS:
            at = decays + tl.cast(source, tl.int64) * decay_piece + batch * decay_batch
            decay = tl.load(at + rows * decay_row, mask=rows < folded, other=1.0).to(x.dtype)[:, None]
            x = tl.where(decay == 0, 0.0, decay * x)  # where nothing is left, inf and nan neither
        at = states + tl.cast(source, tl.int64) * state_piece + batch * state_batch
        at += rows[:, None] * state_row + columns[None, :]
        x += tl.load(at, mask=(rows[:, None] < folded) & inside, other=0.0)
