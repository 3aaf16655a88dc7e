"""Constant buffers that casts must not round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class ExactBuffers(nn.Module):
    """A module whose own buffers keep dtype and value when `.half()`, `.bfloat16()` or `.to(dtype)` cast the model."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in exact.items():
            cast = getattr(self, name)
            if cast.dtype != value.dtype:
                setattr(self, name, nn.Buffer(value.to(cast.device), persistent=False))
        return self


class LinearLlama3RotaryEmbedding(ExactBuffers, LlamaRotaryEmbedding):
    """Llama's. Frequencies rounded to bfloat16, off by up to 0.2 %, would turn far tokens by other angles."""
