"""States from chunk to chunk: the recurrence of the forward pass, and mirrored in time that of its gradient."""

import triton
import triton.language as tl

from .tiles import CHANNEL, NONE, load_decay, load_state, load_tile, store_state


@triton.jit
def state_scan_kernel(
    x, y, gate, entering, states, ends, decays, segments, tokens, scale, chunks,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr,
    ENTERING: tl.constexpr, STATES: tl.constexpr, ENDS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Forward (x = k, y = v): `S <- e^total S + sum_j e^{total - b_j} k_j v_j^T` over the chunks of a segment.

    REVERSE (x = q, y = d_out), from the last chunk to the first: `D <- e^total D + scale * sum_i e^{b_i} q_i do_i^T`.
    x `[B, T, H * G, K]`, y `[B, T, H * G, V]`, G = 1 forward; entering and ends `[B, segments, H, K, V]` and decays
    `[B, segments, H, K]` (the decay over the complete segment) float32; states `[B, chunks, H, K, V]`, what each chunk
    receives.
    Grid: (segments * K / BK * V / BV, B * H).
    """
    tiles_v: tl.constexpr = (V + BV - 1) // BV
    tiles: tl.constexpr = (K + BK - 1) // BK * tiles_v
    segment, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    start, stop = tl.load(segments + 3 * segment), tl.load(segments + 3 * segment + 1)
    chunk = tl.load(segments + 3 * segment + 2)
    keys = tile // tiles_v * BK + tl.arange(0, BK)
    values = tile % tiles_v * BV + tl.arange(0, BV)
    first = tl.cast(batch, tl.int64) * tokens
    place = (tl.cast(batch, tl.int64) * (tl.num_programs(0) // tiles) + segment) * H + head

    state = tl.zeros([BK, BV], dtype=tl.float32)
    if ENTERING:
        state = load_state(entering + place * K * V, keys, values, K, V, tl.float32)
    log_total = tl.zeros([BK if GATE == CHANNEL else 1], dtype=tl.float32)
    count = (stop - start + C - 1) // C
    for n in range(count):
        c = count - 1 - n if REVERSE else n
        token, valid = first + start + c * C, stop - start - c * C
        if STATES:
            here = (tl.cast(batch, tl.int64) * chunks + chunk + c) * H + head
            store_state(states + here * K * V, state, keys, values, K, V)
        if GATE != NONE:
            b, total = load_decay(gate, token, head, valid, keys, H, K, C, GATE)
            weight = tl.exp2(b) if REVERSE else tl.exp2(total[None, :] - b)
            state *= tl.exp2(total)[:, None]
            log_total += total
        for g in range(G):
            rows_x = load_tile(x + ((token * H + head) * G + g) * K, valid, keys, K, H * G * K, C, DOT)
            rows_y = load_tile(y + ((token * H + head) * G + g) * V, valid, values, V, H * G * V, C, DOT)
            if GATE == CHANNEL:
                rows_x = (rows_x * weight).to(DOT)
            elif GATE != NONE:
                rows_y = (rows_y * weight).to(DOT)
            if REVERSE:
                state += tl.dot(tl.trans(rows_x), rows_y, input_precision=PRECISION) * scale
            else:
                state = tl.dot(tl.trans(rows_x), rows_y, state, input_precision=PRECISION)
    if ENDS:
        store_state(ends + place * K * V, state, keys, values, K, V)
        if GATE != NONE:
            if tile % tiles_v == 0:
                tl.store(
                    decays + place * K + keys, tl.zeros([BK], dtype=tl.float32) + tl.exp2(log_total), mask=keys < K
                )
