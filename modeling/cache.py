"""The cache of a model without any softmax layer."""

from __future__ import annotations

from transformers import DynamicCache, PreTrainedConfig


class CountingCache(DynamicCache):
    """A `DynamicCache` that counts tokens itself.

    transformers reads the number of cached tokens off a softmax layer and raises where there is none. The
    model calls `advance` after every forward pass.
    """

    is_compileable = False  # the count is a Python integer; a compiled step would freeze it

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.num_tokens = 0

    def advance(self, num_tokens: int) -> None:
        """Count the tokens of one forward pass."""
        self.num_tokens += num_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, the same for every layer."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, key offset) of a mask for the next `query_length` tokens."""
        return self.num_tokens + query_length, 0

    def reset(self) -> None:
        """Forget every state and the count."""
        super().reset()
        self.num_tokens = 0
