"""Output of linear attention: one pass over q, k and v, the state staying on chip."""

import triton
import triton.language as tl

from .tiles import CHANNEL, HEAD, NONE, SCALAR, load_decay, load_state, load_tile, scores, store_state, store_tile


@triton.jit
def output_kernel(
    q, k, v, gate, entering, out, ends, segments, tokens, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, ENTERING: tl.constexpr, ENDS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`o_t = scale * S_t^T q_t`, chunk after chunk of a segment: the state before the chunk, and the scores inside it.

    q `[B, T, H * G, K]`, k `[B, T, H, K]`, v `[B, T, H, V]`, out `[B, T, H * G, V]`; entering and ends
    `[B, segments, H, K, V]` float32, the states before and after every segment. Where BK does not cover K, every K / BK
    columns of keys give a part of the sum, out `[K / BK, B, T, H * G, V]`.
    Grid: (segments * K / BK * V / BV, B * H).
    """
    parts: tl.constexpr = (K + BK - 1) // BK
    width: tl.constexpr = K if parts == 1 else BK
    tiles: tl.constexpr = (V + BV - 1) // BV * parts
    segment, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    start, stop = tl.load(segments + 3 * segment), tl.load(segments + 3 * segment + 1)
    begin = tile % parts * BK
    keys, values = begin + tl.arange(0, BK), tile // parts * BV + tl.arange(0, BV)
    out += tile % parts * tl.cast(tl.num_programs(1) // H, tl.int64) * tokens * (H * G * V)
    first = tl.cast(batch, tl.int64) * tokens
    place = (tl.cast(batch, tl.int64) * (tl.num_programs(0) // tiles) + segment) * H + head

    state = tl.zeros([BK, BV], dtype=tl.float32)
    if ENTERING:
        state = load_state(entering + place * K * V, keys, values, K, V, tl.float32)
    for i in range(start, stop, C):
        token, valid = first + i, stop - i
        value = load_tile(v + (token * H + head) * V, valid, values, V, H * V, C, DOT)
        b, total = 0.0, 0.0
        if GATE == HEAD or GATE == SCALAR:
            b, total = load_decay(gate, token, head, valid, keys, H, K, C, GATE)
        if GATE != CHANNEL:
            key = load_tile(k + (token * H + head) * K, valid, keys, K, H * K, C, DOT)
        before = state.to(DOT)
        for g in range(G):
            s = scores(q, k, gate, b, token, head, g, valid, begin, H, G, K, width, BC, C, GATE, DOT, PRECISION)
            query = load_tile(q + ((token * H + head) * G + g) * K, valid, keys, K, H * G * K, C, DOT)
            if GATE == CHANNEL:
                b_channel, _ = load_decay(gate, token, head, valid, keys, H, K, C, GATE)
                query = (query * tl.exp2(b_channel)).to(DOT)
            o = tl.dot(query, before, input_precision=PRECISION)
            if GATE == HEAD or GATE == SCALAR:
                o *= tl.exp2(b)
            o = tl.dot(s.to(DOT), value, o, input_precision=PRECISION) * scale
            store_tile(out + ((token * H + head) * G + g) * V, o, valid, values, V, H * G * V, C)
        if GATE == CHANNEL:
            key = load_tile(k + (token * H + head) * K, valid, keys, K, H * K, C, DOT)
            b_channel, total = load_decay(gate, token, head, valid, keys, H, K, C, GATE)
            key = (key * tl.exp2(total[None, :] - b_channel)).to(DOT)
        elif GATE != NONE:
            value = (value * tl.exp2(total[None, :] - b)).to(DOT)
        if GATE != NONE:
            state *= tl.exp2(total)[:, None]
        state = tl.dot(tl.trans(key), value, state, input_precision=PRECISION)
    if ENDS:
        store_state(ends + place * K * V, state, keys, values, K, V)
