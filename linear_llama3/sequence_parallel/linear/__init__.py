"""Linear layers: one file per exchange of states."""

from .attention import LINEAR_STRATEGIES, linear_attention, start_linear_attention

__all__ = ["LINEAR_STRATEGIES", "linear_attention", "start_linear_attention"]
