"""Caches for decoding with recurrent states."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import LinearAttentionLayer

from .configuration import LinearLlama3Config


class StateCache(DynamicCache):
    """A `DynamicCache` in which some layers keep a recurrent state."""

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError, before any layer has changed: a state cannot be rolled back."""
        raise ValueError(
            f"a recurrent state cannot forget its last tokens, got crop({tokens_to_remove}); "
            "keep copy.deepcopy(cache) of the point to return to, or run the shorter sequence again"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the copies of a row are adjacent."""
        self.batch_select_indices(torch.arange(self._rows()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows with these indices, in this order."""
        self.reorder_cache(indices)  # type: ignore[arg-type]

    def _rows(self) -> int:
        states = (layer.recurrent_states[0] for layer in self.layers if isinstance(layer, LinearAttentionLayer))
        return next(states).shape[0]


class RecurrentCache(StateCache):
    """The cache of a model without softmax layers: recurrent states and the number of tokens seen.

    transformers reads the number of cached tokens from a softmax layer and raises if there is none. Here the model
    calls `advance` after every forward pass. The count is a tensor, as in transformers' `StaticCache`: a compiled
    decoding step would contain an integer as a constant.

    Args:
        static: let `generate` compile the decoding step (on GPUs), as `cache_implementation="static"` requests.
    """

    is_compileable = False  # in the base class a property, with which every `generate` would compile

    def __init__(self, config: PreTrainedConfig, *, static: bool = False) -> None:
        super().__init__(config=config)
        self.is_compileable = static
        self.num_tokens = torch.zeros((), dtype=torch.long)

    def advance(self, num_tokens: int, device: torch.device) -> None:
        """Add the tokens of one forward pass on `device` to the count."""
        if self.num_tokens.device != device:
            self.num_tokens = self.num_tokens.to(device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.num_tokens)  # CUDA graphs write to it in place
        self.num_tokens.add_(num_tokens)

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:  # type: ignore[override]
        """Return the number of tokens seen, the same for every layer: int64 `[]`, not changed by later passes."""
        return self.num_tokens.clone()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[Tensor, int]:  # type: ignore[override]
        """Return (key length, key offset) of a mask for the next `query_length` tokens."""
        return self.num_tokens + query_length, 0

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer. Since transformers 5.24, `generate` does not cut cached tokens off the prompt if all
        layers are linear, because transformers' own cache cannot count tokens. This one can."""
        return [False] * len(self.layers)

    def reset(self) -> None:
        """Reset every state and the count."""
        super().reset()
        self.num_tokens.zero_()


class ShardedCache(DynamicCache):
    """One rank's part of the cache of a prompt that is sharded over several ranks, filled during `prefill`.

    Softmax layers keep the keys and values of the rank's tokens, padding included; linear layers keep the state after
    the last of these tokens.

    Args:
        length: number of tokens of the complete prompt, without padding.
    """

    def __init__(self, config: PreTrainedConfig, length: int) -> None:
        super().__init__(config=config)
        self.length = length


def new_cache(config: LinearLlama3Config) -> DynamicCache:
    """Return an empty cache that fits the layer types of a model."""
    if not config.has_softmax_layers:
        return RecurrentCache(config)
    return StateCache(config=config) if config.linear_layers else DynamicCache(config=config)


def store_state(cache: Cache, state: Tensor, layer_idx: int) -> None:
    """Store the state of a linear layer, `[B, H_kv, D_k, D_v (+ 1)]`, in `cache`."""
    layer = cache.layers[layer_idx]
    if state.requires_grad or (layer.has_previous_state[0] and layer.recurrent_states[0].requires_grad):
        layer.recurrent_states[0] = state  # not in place: autograd needs the old one
        layer.is_recurrent_states_initialized[0] = True
    else:
        cache.update_recurrent_state(state, layer_idx)
    layer.has_previous_state[0] = True  # transformers sets it only for layers with a convolution
