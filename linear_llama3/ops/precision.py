"""In which precision the ops work: chosen here, not by the caller's autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def working_dtype(x: Tensor) -> torch.dtype:
    """Of states, scores and partial results, whatever the inputs: float32, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def without_autocast(function: Function) -> Function:
    """Autocast would round states and scores to bfloat16 inside, also in a hand-written backward pass called under it.

    What autograd derives (attention without a mask, Linformer) keeps its precision only outside of autocast.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), "cpu")
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return cast(Function, call)
