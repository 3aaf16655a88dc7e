"""The decoder layer: a Llama block around a linear or a softmax attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from .attention import LinearLlama3Attention
from .configuration import LinearLlama3Config
from .layers import Tiled, as_floats
from .mixers import LinearAttention


class LinearLlama3DecoderLayer(Tiled, GradientCheckpointingLayer):
    """A Llama block around a linear or a softmax attention."""

    def __init__(self, config: LinearLlama3Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        attention = LinearAttention if layer_idx in config.linear_layers else LinearLlama3Attention
        self.self_attn = attention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Apply the layer to `hidden_states` `[B, T, hidden]`; return the same shape.

        Args:
            position_embeddings: cosines and sines `[B, T, D]`, as floats or as returned by `as_integers`.
            cache: not named `past_key_values`, since transformers 5.17 to 5.23 drop that argument of a checkpointed
                layer, even without gradients.
            kwargs: arguments of the attention.
        """
        kwargs["position_embeddings"] = tuple(map(as_floats, position_embeddings))
        normed = self.in_tiles(self.input_layernorm, hidden_states)
        attention_output, _ = self.self_attn(normed, cache=cache, **kwargs)
        return self.in_tiles(self._feed_forward, hidden_states + attention_output)

    def _feed_forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
