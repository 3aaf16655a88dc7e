"""Attention over sequences that are spread over several devices."""

from .context import SequenceParallelConfig, SequenceParallelContext, enable_sequence_parallel
from .layout import LAYOUTS, shard, unshard
from .linear import LINEAR_STRATEGIES, linear_attention, start_linear_attention
from .softmax import SOFTMAX_STRATEGIES, linformer_attention, softmax_attention

__all__ = [
    "LAYOUTS",
    "LINEAR_STRATEGIES",
    "SOFTMAX_STRATEGIES",
    "SequenceParallelConfig",
    "SequenceParallelContext",
    "enable_sequence_parallel",
    "linear_attention",
    "linformer_attention",
    "shard",
    "softmax_attention",
    "start_linear_attention",
    "unshard",
]
