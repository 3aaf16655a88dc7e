"""What decoding continues from: the caches that are not transformers' own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import LinearAttentionLayer

if TYPE_CHECKING:
    from .configuration import LinearLlama3Config


class StateCache(DynamicCache):
    """A `DynamicCache` some of whose layers keep a recurrent state."""

    def crop(self, tokens_to_remove: int) -> None:
        """Raises `ValueError`, before any layer has changed: the state cannot be taken back."""
        raise ValueError(
            f"a recurrent state cannot forget its last tokens, got crop({tokens_to_remove}); "
            "keep copy.deepcopy(cache) of the point to return to, or run the shorter sequence anew"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        self.batch_select_indices(torch.arange(self._rows()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows of these indices, in their order."""
        self.reorder_cache(indices)  # type: ignore[arg-type]

    def _rows(self) -> int:
        states = (layer.recurrent_states[0] for layer in self.layers if isinstance(layer, LinearAttentionLayer))
        return next(states).shape[0]


class CountingCache(StateCache):
    """A `StateCache` that counts tokens itself.

    transformers reads the number of cached tokens off a softmax layer and raises where there is none. The
    model calls `advance` after every forward pass. The count is a tensor, as in transformers' `StaticCache`: a
    compiled decoding step would contain an integer as a constant.

    `static` is what `cache_implementation="static"` asks for: `generate` compiles the decoding step (on GPUs).
    """

    is_compileable = False  # a property otherwise, which would make every `generate` compile

    def __init__(self, config: PreTrainedConfig, *, static: bool = False) -> None:
        super().__init__(config=config)
        self.is_compileable = static
        self.num_tokens = torch.zeros((), dtype=torch.long)

    def advance(self, num_tokens: int, device: torch.device) -> None:
        """Count the tokens of one forward pass on `device`."""
        if self.num_tokens.device != device:
            self.num_tokens = self.num_tokens.to(device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.num_tokens)  # CUDA graphs write to it in place
        self.num_tokens.add_(num_tokens)

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:  # type: ignore[override]
        """Tokens seen so far, the same for every layer: int64 without dimensions, not changed by later passes."""
        return self.num_tokens.clone()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[Tensor, int]:  # type: ignore[override]
        """(key length, key offset) of a mask for the next `query_length` tokens."""
        return self.num_tokens + query_length, 0

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer. Since transformers 5.24, `generate` does not cut cached tokens off the prompt if all
        layers are linear, because transformers' own cache cannot count tokens. This one can."""
        return [False] * len(self.layers)

    def reset(self) -> None:
        """Forget every state and the count."""
        super().reset()
        self.num_tokens.zero_()


class ShardedCache(DynamicCache):
    """One rank's part of the cache of a prompt that is spread over several ranks, while `prefill` makes it.

    Softmax layers keep the keys and values of the rank's tokens, padding included, linear layers the state after the
    last of its tokens.

    Args:
        length: true tokens of the whole prompt.
    """

    def __init__(self, config: PreTrainedConfig, length: int) -> None:
        super().__init__(config=config)
        self.length = length


def new_cache(config: LinearLlama3Config) -> DynamicCache:
    """An empty cache for every kind of model."""
    if not config.has_softmax_layers:
        return CountingCache(config)
    return StateCache(config=config) if config.linear_layers else DynamicCache(config=config)


def keep_state(cache: Cache, state: Tensor, layer_idx: int) -> None:
    """Puts the state of a linear layer, `[B, H_kv, D_k, D_v (+ 1)]`, in its place."""
    layer = cache.layers[layer_idx]
    if state.requires_grad or (layer.has_previous_state[0] and layer.recurrent_states[0].requires_grad):
        layer.recurrent_states[0], layer.is_recurrent_states_initialized[0] = state, True  # autograd needs the old one
    else:
        cache.update_recurrent_state(state, layer_idx)
    layer.has_previous_state[0] = True  # transformers sets it only where there is a convolution
