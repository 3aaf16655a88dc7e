"""Gradients of q, k, v and the gate, all chunks at once: everything is read from the states around a chunk."""

import triton
import triton.language as tl

from .tiles import (
    CHANNEL,
    HEAD,
    NONE,
    SCALAR,
    halves,
    levels,
    load_decay,
    load_state,
    load_tile,
    pair_decay,
    scores,
    store_tile,
)


@triton.jit
def backward_kernel(
    q, k, v, gate, d_out, states, d_states, dq, dk, dv, d_gate, chunks, tokens, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, GRADIENT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With S the state before a chunk, D the gradient of the state behind it, P the scores and dP = do v^T inside it
    (both with the decay between their tokens, and scaled):

        dv = e^{total - b} k D + P^T do    dk = e^{total - b} v D^T + dP^T q    dq = scale * e^b do S^T + dP k

    Shapes as in `output_kernel`; states, d_states `[B, chunks, H, K, V]`; d_gate (GRADIENT: wanted)
    `[K / BK, B, T, H]`, a share from every tile of channels, for CHANNEL `[B, T, H, K]`. Grid:
    (chunks * (K / BK + V / BV), B * H), a program for the columns of one tile, of dq and dk or of dv: the two together
    would need too many registers.
    """
    tiles_k: tl.constexpr = (K + BK - 1) // BK
    tiles: tl.constexpr = tiles_k + (V + BV - 1) // BV
    chunk, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    start, stop = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    token, valid = tl.cast(batch, tl.int64) * tokens + start, stop - start
    here = ((tl.cast(batch, tl.int64) * (tl.num_programs(0) // tiles) + chunk) * H + head) * K * V
    if tile < tiles_k:
        if GRADIENT and GATE != CHANNEL:
            d_gate += tl.cast(tile, tl.int64) * (tl.num_programs(1) // H) * tokens * H
        key_gradients(
            q, k, v, gate, d_out, states + here, d_states + here, dq, dk, d_gate, token, head, valid, tile, scale,
            H, G, K, V, BK, BC, C, GATE, GRADIENT, DOT, PRECISION,
        )  # fmt: skip
    else:
        value_gradient(
            q, k, gate, d_out, d_states + here, dv, token, head, valid, tile - tiles_k, scale,
            H, G, K, V, BV, BC, C, GATE, DOT, PRECISION,
        )  # fmt: skip


@triton.jit
def value_gradient(
    q, k, gate, d_out, d_states, dv, token, head, valid, tile, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr, BC: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    values = tile * BV + tl.arange(0, BV)
    b = 0.0
    if GATE == HEAD or GATE == SCALAR:
        b, total = load_decay(gate, token, head, valid, values, H, K, C, GATE)
    d_value = tl.zeros([C, BV], dtype=tl.float32)
    for start in range(0, K, BC):
        keys = start + tl.arange(0, BC)
        key = load_tile(k + (token * H + head) * K, valid, keys, K, H * K, C, DOT)
        if GATE == CHANNEL:
            b_channel, total_channel = load_decay(gate, token, head, valid, keys, H, K, C, GATE)
            key = (key * tl.exp2(total_channel[None, :] - b_channel)).to(DOT)
        d_state = load_state(d_states, keys, values, K, V, DOT)
        d_value = tl.dot(key, d_state, d_value, input_precision=PRECISION)
    if GATE == HEAD or GATE == SCALAR:
        d_value *= tl.exp2(total[None, :] - b)
    for g in range(G):
        s = scores(q, k, gate, b, token, head, g, valid, 0, H, G, K, K, BC, C, GATE, DOT, PRECISION)
        d_rows = load_tile(d_out + ((token * H + head) * G + g) * V, valid, values, V, H * G * V, C, DOT)
        d_value = tl.dot(tl.trans((s * scale).to(DOT)), d_rows, d_value, input_precision=PRECISION)
    store_tile(dv + (token * H + head) * V, d_value, valid, values, V, H * V, C)


@triton.jit
def key_gradients(
    q, k, v, gate, d_out, states, d_states, dq, dk, d_gate, token, head, valid, tile, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BC: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, GRADIENT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dq, dk and the decay's gradient.

    The gradient of a token's log decay is the sum of everything that passes the token: from S and the keys before it,
    to D and the queries from it on. A token's own term, which does not decay, takes no part, and nothing large cancels.
    """
    width: tl.constexpr = BK if GATE == CHANNEL else 1
    keys, rows = tile * BK + tl.arange(0, BK), tl.arange(0, C)
    d_key = tl.zeros([C, BK], dtype=tl.float32)
    through = tl.zeros([width], dtype=tl.float32)  # from S to D
    b = 0.0
    for start in range(0, V, BC):
        values = start + tl.arange(0, BC)
        value = load_tile(v + (token * H + head) * V, valid, values, V, H * V, C, DOT)
        d_state = load_state(d_states, keys, values, K, V, DOT)
        d_key = tl.dot(value, tl.trans(d_state), d_key, input_precision=PRECISION)
        if GRADIENT:
            through += column_sum(load_state(states, keys, values, K, V, tl.float32) * d_state, width)
    if GATE != NONE:
        b, total = load_decay(gate, token, head, valid, keys, H, K, C, GATE)
        d_key *= tl.exp2(total[None, :] - b)
    if GRADIENT:
        key = load_tile(k + (token * H + head) * K, valid, keys, K, H * K, C, DOT)
        written = row_products(d_key, key, width, DOT, PRECISION)  # by these keys, to D
        arrived = tl.zeros([C, width], dtype=tl.float32)  # at these queries, from S and from keys before them

    for g in range(G):
        rows_o, at = d_out + ((token * H + head) * G + g) * V, ((token * H + head) * G + g) * K
        ds = tl.zeros([C, C], dtype=tl.float32)
        for start in range(0, V, BC):
            values = start + tl.arange(0, BC)
            d_rows = load_tile(rows_o, valid, values, V, H * G * V, C, DOT)
            value = load_tile(v + (token * H + head) * V, valid, values, V, H * V, C, DOT)
            ds = tl.dot(d_rows, tl.trans(value), ds, input_precision=PRECISION)
        ds *= pair_decay(b, C, GATE) * scale
        query = load_tile(q + at, valid, keys, K, H * G * K, C, DOT)
        if GATE != CHANNEL:
            d_key = tl.dot(tl.trans(ds.to(DOT)), query, d_key, input_precision=PRECISION)
        d_query = tl.zeros([C, BK], dtype=tl.float32)
        for start in range(0, V, BC):
            values = start + tl.arange(0, BC)
            d_rows = load_tile(rows_o, valid, values, V, H * G * V, C, DOT)
            state = load_state(states, keys, values, K, V, DOT)
            d_query = tl.dot(d_rows, tl.trans(state), d_query, input_precision=PRECISION)
        d_query *= scale
        if GATE != NONE:
            d_query *= tl.exp2(b)
        if GRADIENT:
            arrived += row_products(d_query, query, width, DOT, PRECISION)
        key = load_tile(k + (token * H + head) * K, valid, keys, K, H * K, C, DOT)
        if GATE == CHANNEL:
            d_query, d_key, arrived = scores_backward(
                query, key, b, ds, d_query, d_key, arrived, gate, token, head, valid, keys, H, K, C, DOT, PRECISION
            )
        else:
            if GRADIENT:
                # a share for every tile: the products of its own channels with the gradient over all values
                s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
                pairs = tl.where(rows[:, None] > rows[None, :], ds * s, 0.0)
                arrived += (tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0))[:, None]
            d_query = tl.dot(ds.to(DOT), key, d_query, input_precision=PRECISION)
        store_tile(dq + at, d_query, valid, keys, K, H * G * K, C)

    store_tile(dk + (token * H + head) * K, d_key, valid, keys, K, H * K, C)
    if GRADIENT:
        d_decay = tl.cumsum(arrived, axis=0, reverse=True) + sum_before(written)
        d_decay += (through * tl.exp2(total))[None, :]
        if GATE == CHANNEL:
            store_tile(d_gate + (token * H + head) * K, d_decay, valid, keys, K, H * K, C)
        else:
            store_tile(d_gate + token * H + head, d_decay, valid, tl.arange(0, 1), 1, H, C)


@triton.jit
def scores_backward(
    query, key, b, ds, d_query, d_key, arrived, gate, token, head, valid, keys,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradients of `scores` with a decay per channel; `arrived` gets `q dq - k dk` between tokens."""
    own = diagonal(ds)
    d_query += own * key
    d_key += own * query
    for level in tl.range(levels(C), num_stages=1):
        late, same, decay = halves(gate, b, token, head, valid, keys, level, H, K, C)
        second = tl.where(late, query * decay, 0.0).to(DOT)
        first = tl.where(late, 0.0, key * decay).to(DOT)
        part = tl.where(same, ds, 0.0).to(DOT)
        to_query = tl.where(late, tl.dot(part, first, input_precision=PRECISION) * decay, 0.0)
        to_key = tl.where(late, 0.0, tl.dot(tl.trans(part), second, input_precision=PRECISION) * decay)
        d_query += to_query
        d_key += to_key
        arrived += to_query * query - to_key * key
    return d_query, d_key, arrived


@triton.jit
def row_products(x, y, width: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """`x * y`, or summed over the columns to `[C, 1]`: the diagonal of a matrix product, which needs few registers."""
    if width > 1:
        product = x * y
    else:
        product = diagonal(tl.dot(x.to(DOT), tl.trans(y), input_precision=PRECISION))
    return product


@triton.jit
def diagonal(x):
    rows = tl.arange(0, x.shape[0])
    return tl.sum(tl.where(rows[:, None] == rows[None, :], x, 0.0), axis=1)[:, None]


@triton.jit
def column_sum(x, width: tl.constexpr):
    """`[BK, BV]` to `[BK]`, or to `[1]`."""
    sums = tl.sum(x, axis=1)
    return sums if width > 1 else tl.sum(sums, axis=0) + tl.zeros([1], dtype=tl.float32)


@triton.jit
def sum_before(x):
    """Sum the rows before each row, without its own, which may be far larger and would swallow them."""
    before, _ = tl.associative_scan((x * 0.0, x), 0, _append)
    return before


@triton.jit
def _append(before_1, sum_1, before_2, sum_2):
    return sum_1 + before_2, sum_1 + sum_2
