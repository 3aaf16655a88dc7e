"""Softmax layers: one file per way to bring queries and keys together."""

from .attention import SOFTMAX_STRATEGIES, softmax_attention
from .linformer import linformer_attention

__all__ = ["SOFTMAX_STRATEGIES", "linformer_attention", "softmax_attention"]
