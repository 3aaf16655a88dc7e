"""Linear layers: one file for every way to exchange states."""

from .attention import LINEAR_STRATEGIES, linear_attention, start_linear_attention

__all__ = ["LINEAR_STRATEGIES", "linear_attention", "start_linear_attention"]
