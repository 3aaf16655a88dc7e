"""One token: the decoding step."""

import triton
import triton.language as tl

from .tiles import CHANNEL, HEAD, NONE, load_state, store_state


@triton.jit
def decode_kernel(
    q, k, v, log_decay, before, after, out, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """`S = e^g S_before + k v^T`, `o = scale * S^T q`: in float32, bound by reading and writing the state.

    q `[B, H * G, K]`, k `[B, H, K]`, v `[B, H, V]`, log_decay `[H]`, `[B, H]` or `[B, H, K]`, before and after
    `[B, H, K, V]` float32. Grid: (B * H, V / BV).
    """
    row = tl.cast(tl.program_id(0), tl.int64)  # of [B, H]
    keys, values = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if BEFORE:
        state = load_state(before + row * K * V, keys, values, K, V, tl.float32)
        if GATE == CHANNEL:
            state *= tl.exp(tl.load(log_decay + row * K + keys, mask=keys < K, other=0.0).to(tl.float32))[:, None]
        elif GATE != NONE:
            state *= tl.exp(tl.load(log_decay + (row % H if GATE == HEAD else row)).to(tl.float32))
    key = tl.load(k + row * K + keys, mask=keys < K, other=0.0).to(tl.float32)
    value = tl.load(v + row * V + values, mask=values < V, other=0.0).to(tl.float32)
    state += key[:, None] * value[None, :]
    store_state(after + row * K * V, state, keys, values, K, V)
    for g in range(G):
        query = tl.load(q + (row * G + g) * K + keys, mask=keys < K, other=0.0).to(tl.float32)
        o = tl.sum(query[:, None] * state, axis=0) * scale
        tl.store(out + (row * G + g) * V + values, o.to(out.dtype.element_ty), mask=values < V)
