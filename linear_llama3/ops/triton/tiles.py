"""Common parts of the kernels: tiles of a chunk, its decays, its causal scores.

Names: C tokens of a chunk (rows of a tile), K and V the head dims D_k and D_v, BK and BV columns of a tile (powers of
two), H kv heads, G query heads per kv head. `b` `[C, 1 or BK]` is the log2 decay cumulated inside the chunk, own token
included; `total` `[1 or BK]` is its last row. Rows behind the end of a document are read as zeros and never written.

Products take tiles of dtype DOT with PRECISION: bfloat16, or float32 in "tf32x3" (float32 inputs) or "tf32" (float16
inputs, whose states could overflow in their own dtype; tf32 has the mantissa of float16 and the range of float32).
"""

import triton
import triton.language as tl

NONE, HEAD, SCALAR, CHANNEL = (tl.constexpr(i) for i in range(4))
"""Gates: no decay, a constant `[H]`, one value per token and head, one per token, head and key channel."""
LOG2E = tl.constexpr(1.4426950408889634)
NOTHING_LEFT = tl.constexpr(
    -150.0
)  # 2 ** -150 is 0 in float32; a smaller sum would only cost the tokens after it digits


@triton.jit
def load_tile(x, valid, columns, width: tl.constexpr, stride: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr):
    """Rows `[0, C)` of the matrix at `x`, zero from row `valid` and column `width` on."""
    rows = tl.arange(0, C)[:, None]
    tile = tl.load(x + rows * stride + columns[None, :], mask=(rows < valid) & (columns[None, :] < width), other=0.0)
    return tile.to(dtype)


@triton.jit
def store_tile(x, tile, valid, columns, width: tl.constexpr, stride: tl.constexpr, C: tl.constexpr):
    rows = tl.arange(0, C)[:, None]
    mask = (rows < valid) & (columns[None, :] < width)
    tl.store(x + rows * stride + columns[None, :], tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_state(x, keys, values, K: tl.constexpr, V: tl.constexpr, dtype: tl.constexpr):
    """The tile `[keys, values]` of the state `[K, V]` at `x`."""
    mask = (keys[:, None] < K) & (values[None, :] < V)
    return tl.load(x + keys[:, None] * V + values[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def store_state(x, state, keys, values, K: tl.constexpr, V: tl.constexpr):
    mask = (keys[:, None] < K) & (values[None, :] < V)
    tl.store(x + keys[:, None] * V + values[None, :], state.to(x.dtype.element_ty), mask=mask)


@triton.jit
def bounded(g):
    """A log2 decay not below that of nothing left; nan stays nan."""
    return tl.where(g < NOTHING_LEFT, NOTHING_LEFT, g)


@triton.jit
def load_decay(
    gate, token, head, valid, keys, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """`b` and `total` of the chunk that begins at `token`, of which `valid` rows are in the document."""
    rows = tl.arange(0, C)
    if GATE == HEAD:
        slope = bounded(tl.load(gate + head).to(tl.float32) * LOG2E)
        b = (slope * tl.minimum(rows + 1, valid))[:, None]
        total = slope * tl.full([1], 1, tl.float32) * tl.minimum(valid, C)
    elif GATE == SCALAR:
        at = gate + token * H + head
        b = tl.load(at + tl.minimum(rows, valid - 1) * H)[:, None]  # constant behind the end: no exponent is > 0
        total = tl.load(at + (tl.minimum(valid, C) - 1) * H + tl.arange(0, 1))
    else:
        at = gate + (token * H + head) * K
        b = load_tile(at, valid, keys, K, H * K, C, tl.float32)
        total = tl.load(at + (tl.minimum(valid, C) - 1) * H * K + keys, mask=keys < K, other=0.0)
    return b, total


@triton.constexpr_function
def levels(C):
    """The number of times a chunk can be halved."""
    return C.bit_length() - 1


@triton.jit
def halves(
    gate, b, token, head, valid, keys, level, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """For blocks of C, C / 2, ... rows, mark the rows in the second half `[C, 1]` and the pairs in one block `[C, C]`,
    and compute the decay of each row relative to the edge between its halves, at most 1 `[C, BK]`."""
    shift = levels(C) - 1 - level  # a half has 2^shift rows
    rows = tl.arange(0, C)
    edge = ((rows >> shift) | 1) * (1 << shift) - 1  # the last row of the first half
    mask = (edge[:, None] < valid) & (keys[None, :] < K)
    b_edge = tl.load(gate + (token * H + head) * K + edge[:, None] * (H * K) + keys[None, :], mask=mask, other=0.0)
    block = rows >> (shift + 1)
    return ((rows >> shift) & 1 == 1)[:, None], block[:, None] == block[None, :], tl.exp2(-tl.abs(b - b_edge))


@triton.jit
def scores(
    q, k, gate, b, token, head, g, valid, begin,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`q_i . k_j` with the decay between the tokens, 0 where j > i, `[C, C]` float32; query head g of kv head `head`,
    the WIDTH columns from `begin` on, BK at a time.

    A decay per channel does not factor out of the product, and `(q e^b)(k e^-b)` overflows. So the triangle is halved
    again and again: between two halves of a block both decays are taken relative to the edge between them, where
    they are at most 1 for any decay (Yang et al., arXiv:2312.06635, section 4.3, carried down to single tokens).
    """
    rows = tl.arange(0, C)
    s = tl.zeros([C, C], dtype=tl.float32)
    for start in range(0, WIDTH, BK):
        keys = begin + start + tl.arange(0, BK)
        query = load_tile(q + ((token * H + head) * G + g) * K, valid, keys, K, H * G * K, C, DOT)
        key = load_tile(k + (token * H + head) * K, valid, keys, K, H * K, C, DOT)
        if GATE != CHANNEL:
            s = tl.dot(query, tl.trans(key), s, input_precision=PRECISION)
        else:
            b_channel, _ = load_decay(gate, token, head, valid, keys, H, K, C, GATE)
            own = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)
            s += tl.where(rows[:, None] == rows[None, :], own[:, None], 0.0)
            for level in tl.range(levels(C), num_stages=1):
                late, same, decay = halves(gate, b_channel, token, head, valid, keys, level, H, K, C)
                second = tl.where(late, query * decay, 0.0).to(DOT)
                first = tl.where(late, 0.0, key * decay).to(DOT)
                s += tl.where(same, tl.dot(second, tl.trans(first), input_precision=PRECISION), 0.0)
    return s if GATE == CHANNEL else s * pair_decay(b, C, GATE)


@triton.jit
def pair_decay(b, C: tl.constexpr, GATE: tl.constexpr):
    """The decay between two tokens, 0 for the future; for CHANNEL, whose channels differ, only that mask."""
    rows = tl.arange(0, C)
    past = rows[:, None] >= rows[None, :]
    if GATE == HEAD or GATE == SCALAR:
        return tl.where(past, tl.exp2(tl.where(past, b - tl.trans(b), 0.0)), 0.0)  # masked first: 2^(> 0) may be inf
    return tl.where(past, 1.0, 0.0)
