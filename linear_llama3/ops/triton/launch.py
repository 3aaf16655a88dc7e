"""The kernels as functions of tensors: grids, strides, outputs."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .backward import backward_kernel
from .configurations import Tiles, configuration, power_of_two
from .decode import decode_kernel
from .gate_cumsum import gate_cumsum_kernel
from .merge import merge_kernel
from .output import output_kernel
from .segments import cut, segment_length
from .state_scan import state_scan_kernel
from .tiles import CHANNEL, HEAD, NONE, SCALAR

INTERPRETED = bool(triton.knobs.runtime.interpret)
ALIGNMENT = 8


class Launcher:
    """The kernels over one set of inputs, contiguous.

    q `[B, T, H * G, K]`, k `[B, T, H, K]`, v `[B, T, H, V]`; log_decay None, `[H]`, `[B, T, H]` or `[B, T, H, K]`.
    The states of segments are `[B, segments, H, K, V]` float32; those of chunks `[B, chunks, H, K, V]`, in bfloat16 for
    bfloat16 inputs: rounding them costs no more than rounding the output does, and nothing adds up.
    """

    def __init__(
        self, k: Tensor, v: Tensor, log_decay: Tensor | None, boundaries: tuple[int, ...], *, backward: bool = False,
        decay_gradient: bool = False,
    ) -> None:  # fmt: skip
        self.k, self.v = k.contiguous(), v.contiguous()
        self.batch, self.tokens, self.heads, self.key_dim = k.shape
        self.value_dim, self.rows = v.shape[3], self.batch * self.heads
        self.gate = _gate(log_decay)
        # a gate per channel needs its gradient's intermediates anyway
        self.decay_gradient = self.gate == CHANNEL.value or (decay_gradient and log_decay is not None)
        self.configuration = configuration(
            self.gate, self.key_dim, self.value_dim, wide=k.dtype != torch.bfloat16, decay_gradient=self.decay_gradient,
            capability=capability(k.device),
        )  # fmt: skip
        self.chunk = self.configuration.chunk if backward else self.configuration.rows
        self.segments = cut(boundaries, length=segment_length(k, v), chunk=self.chunk, device=k.device)
        self.b = None if log_decay is None else self._cumulated(log_decay.contiguous())

    def _cumulated(self, log_decay: Tensor) -> Tensor:
        """The log decay as the kernels read it: summed inside chunks if it varies there."""
        if self.gate == HEAD.value:
            return log_decay
        width = log_decay.shape[2:].numel()
        block = min(power_of_two(width), 32)
        b = torch.empty_like(log_decay, dtype=torch.float32)
        with on(self.k.device):
            gate_cumsum_kernel[len(self.segments.chunks), triton.cdiv(width, block), self.batch](
                log_decay, b, self.segments.chunks, self.tokens, WIDTH=width, BW=block, C=self.chunk, num_warps=4
            )
        return b

    def scan(
        self, x: Tensor, y: Tensor, which: tuple[int, ...] | None, *, scale: float = 1.0,
        entering: Tensor | None = None, states: bool = False, ends: bool = False, reverse: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """States of the chunks, and states and decays `[B, n, H, K]` of the segments (or of these)."""
        tiles, table = self.configuration.scan, self.segments.table(which)
        count, chunks = len(table), len(self.segments.chunks)
        stored = torch.bfloat16 if self.k.dtype == torch.bfloat16 else torch.float32
        chunk_states = self._empty(chunks, self.value_dim, dtype=stored) if states else None
        end_states = self._empty(count, self.value_dim) if ends else None
        decays = self._empty(count) if ends and self.gate != NONE.value else None
        grid = (count * triton.cdiv(self.key_dim, tiles.BK) * triton.cdiv(self.value_dim, tiles.BV), self.rows)
        with on(self.k.device):
            state_scan_kernel[grid](
                x, y, self.b, entering, chunk_states, end_states, decays, table, self.tokens, scale, chunks,
                **self._common(tiles, x), REVERSE=reverse,
                ENTERING=entering is not None, STATES=states, ENDS=ends,
            )  # fmt: skip
        return chunk_states, end_states, decays

    def output(
        self, q: Tensor, entering: Tensor | None, *, scale: float, dtype: torch.dtype, ends: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Out `[B, T, H * G, V]`, and the states behind the segments."""
        tiles, count = self.configuration.output, len(self.segments)
        parts = triton.cdiv(self.key_dim, tiles.BK)  # of a sum over the columns of keys
        partial = dtype if parts == 1 else torch.float32
        out = torch.empty(parts, *q.shape[:3], self.value_dim, dtype=partial, device=q.device)
        end_states = self._empty(count, self.value_dim) if ends else None
        with on(self.k.device):
            output_kernel[count * parts * triton.cdiv(self.value_dim, tiles.BV), self.rows](
                q, self.k, self.v, self.b, entering, out, end_states, self.segments.table(None), self.tokens, scale,
                **self._common(tiles, q), BC=tiles.BC, ENTERING=entering is not None, ENDS=ends,
            )  # fmt: skip
        return out[0] if parts == 1 else out.sum(0).to(dtype), end_states

    def gradients(
        self, q: Tensor, d_out: Tensor, states: Tensor, d_states: Tensor, *, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and the log decay."""
        tiles = self.configuration.backward
        dq, dk, dv = (torch.empty_like(x) for x in (q, self.k, self.v))
        key_tiles, d_gate = triton.cdiv(self.key_dim, tiles.BK), None
        if self.decay_gradient:
            shape = (key_tiles, *self.k.shape[:3]) if self.gate != CHANNEL.value else self.k.shape
            d_gate = torch.empty(shape, dtype=torch.float32, device=self.k.device)
        programs = len(self.segments.chunks) * (key_tiles + triton.cdiv(self.value_dim, tiles.BV))
        with on(self.k.device):
            backward_kernel[programs, self.rows](
                q, self.k, self.v, self.b, d_out, states, d_states, dq, dk, dv, d_gate, self.segments.chunks,
                self.tokens, scale, **self._common(tiles, q), BC=tiles.BC, GRADIENT=self.decay_gradient,
            )  # fmt: skip
        if d_gate is not None and self.gate != CHANNEL.value:
            d_gate = d_gate.sum((0, 1, 2)) if self.gate == HEAD.value else d_gate.sum(0)
        return dq, dk, dv, d_gate

    def _empty(self, count: int, *columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = (self.batch, count, self.heads, self.key_dim, *columns)
        return torch.empty(shape, dtype=dtype, device=self.k.device)

    def _common(self, tiles: Tiles, queries: Tensor) -> dict[str, Any]:
        return {
            "H": self.heads, "G": queries.shape[2] // self.heads, "K": self.key_dim, "V": self.value_dim,
            "BK": tiles.BK, "BV": tiles.BV, "C": self.chunk, "GATE": self.gate,
            **precision(self.k.dtype), "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip


def _gate(log_decay: Tensor | None) -> int:
    return NONE.value if log_decay is None else {1: HEAD.value, 3: SCALAR.value, 4: CHANNEL.value}[log_decay.dim()]


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Select the device of the tensors: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def precision(dtype: torch.dtype) -> dict[str, Any]:
    """The dtype and the precision of matrix products (see `tiles.py`)."""
    if dtype == torch.bfloat16 and not INTERPRETED:  # the interpreter multiplies bfloat16 wrongly
        return {"DOT": tl.bfloat16, "PRECISION": "ieee"}
    return {"DOT": tl.float32, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32"}


def merge(states: Tensor, decays: Tensor | None, steps: Tensor, targets: int, initial: Tensor | None = None) -> Tensor:
    """The states that enter, `[B, targets, H, K, V]`, of pieces `[n, B, H, K, V]` that decay by `[n, B, H, K]`.

    Strides of the pieces: any between pieces, batch rows, and rows of H * K; V is dense.
    """
    _, batch, heads, key_dim, value_dim = states.shape
    entering = torch.empty(batch, targets, *states.shape[2:], dtype=states.dtype, device=states.device)
    initial = None if initial is None else initial.contiguous()
    rows, (block_rows, block_columns) = heads * key_dim, (16, min(power_of_two(value_dim), 128))
    decay_strides = (0, 0, 0) if decays is None else (*decays.stride()[:2], decays.stride(3))
    with on(states.device):
        merge_kernel[triton.cdiv(rows, block_rows), triton.cdiv(value_dim, block_columns), batch](
            states, decays, initial, entering, steps, len(steps),
            *states.stride()[:2], states.stride(3), *decay_strides,
            *((0, 0) if initial is None else initial.stride()[:2]), entering.stride(1), entering.stride(0),
            ROWS=rows, V=value_dim, BR=block_rows, BV=block_columns,
            DECAYS=decays is not None, INITIAL=initial is not None, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return entering


def pad_head_dims(k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pad head dims with zeros to multiples of 8, so that kernels can read words of 16 bytes; queries like keys."""
    keys, values = -k.shape[-1] % ALIGNMENT, -v.shape[-1] % ALIGNMENT
    if keys and log_decay is not None and log_decay.dim() == 4:
        log_decay = F.pad(log_decay, (0, keys))
    return F.pad(k, (0, keys)) if keys else k, F.pad(v, (0, values)) if values else v, log_decay


def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, *, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One token: out `[B, 1, H * G, V]`, and the state after it `[B, H, K, V]` float32."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, _, heads, key_dim = k.shape
    value_dim = v.shape[3]
    after = torch.empty(batch, heads, key_dim, value_dim, dtype=torch.float32, device=k.device)
    out = torch.empty(*q.shape[:3], value_dim, dtype=dtype, device=k.device)
    block = min(power_of_two(value_dim), 32)
    with on(k.device):
        decode_kernel[batch * heads, triton.cdiv(value_dim, block)](
            q, k, v, None if log_decay is None else log_decay.contiguous(),
            None if state is None else state.float().contiguous(), after, out, scale,
            H=heads, G=q.shape[2] // heads, K=key_dim, V=value_dim, BK=power_of_two(key_dim), BV=block,
            GATE=_gate(log_decay), BEFORE=state is not None, num_warps=4,
        )  # fmt: skip
    return out, after


@functools.cache
def capability(device: torch.device) -> int:
    """80, 90, ...; the newest for a device that only interprets kernels."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
