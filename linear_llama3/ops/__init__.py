"""Mathematics on one device: linear attention, softmax attention, feature maps and decays."""

from .linear_attention import linear_attention

__all__ = ["linear_attention"]
