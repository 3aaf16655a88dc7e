"""The precision of the ops, chosen here and not by the caller's autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states, scores and partial results: float64 for float64 inputs, otherwise float32."""
    return torch.promote_types(x.dtype, torch.float32)


def without_autocast(function: Function) -> Function:
    """Disable autocast inside `function`, where it would round states and scores to bfloat16, backward passes included.

    Backward passes that autograd derives (attention without a mask, Linformer) keep their precision only outside of
    autocast.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), "cpu")
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return cast(Function, call)
