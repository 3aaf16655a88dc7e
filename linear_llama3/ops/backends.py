"""The choice of an implementation of the recurrence."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

BACKENDS = ("recurrent", "chunked", "triton")
LARGEST_KEY = 256  # columns of a state that one program holds
MOST_ROWS = 65535  # B * H_kv, a grid's second dimension

logger = logging.getLogger(__name__)


def choose_backend(name: str, k: Tensor, *, causal: bool = True) -> str:
    """The backend for these keys `[B, T, H_kv, D_k]`; "auto" is Triton on CUDA and otherwise chunked, recurrent for a
    single token.

    Raises:
        ValueError: a backend that does not exist, or "triton" where it cannot run.
    """
    check_backend(name)
    if name not in ("auto", "triton"):
        return name
    obstacle = triton_obstacle(k, causal=causal)
    if name == "triton":
        if obstacle:
            raise ValueError(f"backend 'triton' {obstacle}; use backend='auto' or 'chunked'")
        return name
    if k.is_cuda:
        if obstacle is None:
            return "triton"
        _say(f"linear attention runs in PyTorch on this GPU: backend 'triton' {obstacle}")
    return "recurrent" if k.shape[1] == 1 else "chunked"


def check_backend(name: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {name!r}")


def triton_obstacle(k: Tensor, *, causal: bool = True) -> str | None:
    """The reason why the kernels cannot serve a call, to follow "backend 'triton'"; None if they can."""
    if not causal:
        return "is causal: without a mask attention is two plain matrix products, got causal=False"
    if k.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, got {k.dtype}"
    if k.shape[-1] > LARGEST_KEY:
        return f"takes head dims D_k up to {LARGEST_KEY}, got {k.shape[-1]}"
    if k.shape[0] * k.shape[2] > MOST_ROWS:
        return f"takes B * H_kv up to {MOST_ROWS}, got {k.shape[0]} * {k.shape[2]}"
    return device_obstacle(k.device)


@torch.compiler.assume_constant_result  # it cannot be traced
def device_obstacle(device: torch.device) -> str | None:
    return _find_device_obstacle(device)


@functools.cache
def _find_device_obstacle(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs a CUDA device, got {device} (on a CPU, TRITON_INTERPRET=1 runs the kernels for tests)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0 or newer, got {torch.cuda.get_device_capability(device)}"
    return None


@torch.compiler.assume_constant_result
def _say(message: str) -> None:
    _say_once(message)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
