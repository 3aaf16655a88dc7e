"""Linear attention layers: one module for every mixer of the table in configuration.py.

"basic" is the linear attention of LASP-2 (arXiv:2502.07563). The others: lightning attention with MiniMax-01's decays
(arXiv:2501.08313), RetNet's retention (arXiv:2307.08621), GLA (arXiv:2312.06635), Based (arXiv:2402.18668) and ReBased
(arXiv:2402.10644).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from ..ops import linear_attention
from ..ops.feature_maps import FEATURE_MAPS
from ..ops.precision import working_dtype
from ..sequence_parallel import SequenceParallelContext
from .cache import ShardedCache, store_state
from .configuration import LinearLlama3Config
from .layers import ExactTensors, Tiled

DECAY_RANK = 16  # inner width of the learned decay's projection (GLA, arXiv:2312.06635, section 4.4)
DECAY_TEMPERATURE = 16.0  # divisor of the learned log decay (the same section)


class LearnedFeatureMap(nn.Module):
    """A feature map with the parameters of one layer's queries or keys."""

    def __init__(self, name: str, heads: int, dim: int) -> None:
        super().__init__()
        self.name, self.sizes = name, (heads, dim)
        for parameter, value in self.initial_values().items():
            self.register_parameter(parameter, nn.Parameter(value))

    def initial_values(self) -> dict[str, Tensor]:
        """Return the initial parameters; called again after a build on the meta device."""
        return FEATURE_MAPS[self.name].parameters(*self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features `[B, T, H, F]` of queries or keys `[B, T, H, D]`."""
        return FEATURE_MAPS[self.name](x, **dict(self.named_parameters()))


class LinearAttention(Tiled, ExactTensors):
    """The attention of a linear layer, with the projections of Llama's softmax attention.

    Queries and keys pass through feature map and rotary embedding, and the mixer determines the decay of the state. The
    output is normalized (by the sum of the weights, or by an RMSNorm per head over D_v), gated and projected. The
    decoding state `config.linear_state_shape` is float32 and is stored in the cache's recurrent state of this layer.
    """

    layer_type = "linear_attention"
    exact_parameters = ("decay_bias",)

    def __init__(self, config: LinearLlama3Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.mixer = mixer = config.mixer
        self.num_heads = heads = config.num_attention_heads
        self.num_kv_heads, self.key_dim, self.value_dim = config.linear_sizes
        self.is_causal = config.is_causal
        self.sequence_parallel_context: SequenceParallelContext | None = None

        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, heads * self.key_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * self.key_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * self.value_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.value_dim, hidden, bias=bias)
        self.q_feature_map = LearnedFeatureMap(config.feature_map, heads, self.key_dim)
        self.k_feature_map = LearnedFeatureMap(config.feature_map, self.num_kv_heads, self.key_dim)
        if config.uses_linear_output_norm:
            self.o_norm = LlamaRMSNorm(self.value_dim, eps=config.rms_norm_eps)
        if mixer.learned_decay:
            self.decay_down_proj = nn.Linear(hidden, DECAY_RANK, bias=False)
            features = self.num_kv_heads * config.linear_state_shape[1]
            self.decay_up_proj = nn.Linear(DECAY_RANK, features, bias=False)
            # Not the projection's bias: transformers initializes a parameter only through the module that owns it.
            # In float32 for models of any dtype: near 6, bfloat16 values are 0.03 apart, more than any update.
            initial = torch.full((features,), config.gate_bias_init)
            self.decay_bias = nn.Parameter(initial.to(working_dtype(initial)))
        if config.linear_output_gate:
            self.g_proj = nn.Linear(hidden, heads * self.value_dim, bias=False)
            self.gate_activation = ACT2FN[mixer.output_gate]
        if mixer.constant_log_decay is not None:
            # exact: a rounded decay would define a different model
            self.log_decay = nn.Buffer(self.constant_log_decay(), persistent=False)

    def constant_log_decay(self) -> Tensor:
        """Return the decay buffer, `[H_kv]` float32; called again after a build on the meta device."""
        assert self.mixer.constant_log_decay is not None
        return self.mixer.constant_log_decay(self.num_kv_heads, self.layer_idx, self.config.num_hidden_layers)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        exchange_cache: MutableMapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return the output `[B, T, hidden]` for `hidden_states` of the same shape, and None for attention weights.

        Args:
            position_embeddings: cosines and sines `[B, T, D]`, in float32 or float64.
            attention_mask: `[B, T]`, 0 at padding.
            cache: contains the state to continue from, and receives the new one.
            cu_seq_lens_q: document edges `[N + 1]` in the B * T tokens read row by row; under a context, in the
                complete sequence.
            exchange_cache: see `sequence_parallel.linear_attention`.
            kwargs: ignored; arguments of softmax layers.
        """
        k, v, log_decay = self._keys_values(hidden_states, position_embeddings, attention_mask)
        options: dict[str, Any] = {"normalize": self.mixer.normalize, "causal": self.is_causal}
        if self.sequence_parallel_context is not None:
            attend: Callable[[Tensor], Tensor] = self._start_sharded(
                k, v, cache,
                log_decay=log_decay,
                cu_seqlens=cu_seq_lens_q,
                exchange_cache=exchange_cache,
                **options,
            )  # fmt: skip
        elif cu_seq_lens_q is not None:
            attend = partial(_attend_packed, k=k, v=v, log_decay=log_decay, cu_seqlens=cu_seq_lens_q, **options)
        else:
            attend = partial(self._attend_cached, k=k, v=v, log_decay=log_decay, cache=cache, **options)
        # under a context, the states are exchanged during these projections
        q = self._rotate(
            self.q_feature_map(_split_heads(self.q_proj(hidden_states), self.num_heads)), position_embeddings
        )
        gate = None if self.sequence_tiling else self._gate(hidden_states)
        out = attend(q.to(v.dtype))
        out = out.to(hidden_states.dtype) if self.mixer.normalize else out
        if self.sequence_tiling:
            return self.in_tiles(lambda out, x: self._output(out, self._gate(x)), out, hidden_states), None
        return self._output(out, gate), None

    def _gate(self, x: Tensor) -> Tensor | None:
        return self.gate_activation(self.g_proj(x)) if self.config.linear_output_gate else None

    def _output(self, out: Tensor, gate: Tensor | None) -> Tensor:
        """Normalize, gate and project the output `[B, T, H, D_v]` to `[B, T, hidden]`."""
        out = self.o_norm(out) if self.config.uses_linear_output_norm else out
        out = out.flatten(2)
        return self.o_proj(out if gate is None else out * gate)

    def _keys_values(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        v = _split_heads(self.v_proj(x), self.num_kv_heads)
        if self.mixer.normalize:
            v = v.to(working_dtype(v))  # products of rounded features cancel in a quotient of sums
        k = self._rotate(self.k_feature_map(_split_heads(self.k_proj(x), self.num_kv_heads)), position_embeddings)
        k = k.to(v.dtype)
        log_decay = self._log_decay(x)
        if mask is not None:
            # padding must neither write to the state (after the feature map, since phi(0) may be > 0) nor decay it
            keep = (mask != 0)[:, :, None]  # bool: mask values must not scale keys
            k = k * keep[..., None]
            if log_decay is not None:
                log_decay = log_decay * (keep if log_decay.dim() == 1 else keep[..., None])
        return k, v, log_decay

    def _rotate(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Apply the rotary embedding to queries or keys `[B, T, H, D_k]`, if the mixer has one.

        After the feature map, so that scores depend on relative positions (RoFormer, arXiv:2104.09864). Under autocast
        the rotary table, and so the result, is float32.
        """
        if not self.config.uses_linear_rope:
            return x
        cos, sin = (table.unsqueeze(2) for table in position_embeddings)
        return x * cos + rotate_half(x) * sin

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """Return the log decay: None, `[H_kv]` or, for every feature, `[B, T, H_kv, D_k]`; at least float32."""
        if self.mixer.constant_log_decay is not None:
            return self.log_decay
        if not self.mixer.learned_decay:
            return None
        gate = self.decay_up_proj(self.decay_down_proj(x)) + self.decay_bias
        gate = gate.to(working_dtype(gate))
        return (F.logsigmoid(gate) / DECAY_TEMPERATURE).view(*x.shape[:2], self.num_kv_heads, -1)

    def _attend_cached(
        self, q: Tensor, *, k: Tensor, v: Tensor, log_decay: Tensor | None, cache: Cache | None, **options: Any
    ) -> Tensor:
        if cache is None:
            return linear_attention(q, k, v, log_decay=log_decay, **options)[0]
        layer = cache.layers[self.layer_idx]
        assert isinstance(layer, LinearAttentionCacheLayerMixin)
        out, state = linear_attention(
            q, k, v,
            log_decay=log_decay,
            initial_state=layer.recurrent_states[0] if layer.has_previous_state[0] else None,
            output_final_state=True,
            **options,
        )  # fmt: skip
        assert state is not None
        store_state(cache, state, self.layer_idx)
        return out

    def _start_sharded(self, k: Tensor, v: Tensor, cache: Cache | None, **options: Any) -> Callable[[Tensor], Tensor]:
        """Start attention under a context; in a prefill, store the state after this rank's tokens in `cache`."""
        assert self.sequence_parallel_context is not None
        start = self.sequence_parallel_context.start_linear_attention
        if cache is None:
            return start(k, v, **options)
        assert isinstance(cache, ShardedCache)
        started = start(k, v, length=cache.length, output_final_state=True, **options)

        def attend(q: Tensor) -> Tensor:
            out = started(q)
            assert started.final_state is not None
            store_state(cache, started.final_state, self.layer_idx)
            return out

        return attend


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """Reshape `[B, T, H * D]` to `[B, T, H, D]`."""
    return x.unflatten(-1, (heads, -1))


def _attend_packed(
    q: Tensor, *, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor, **options: Any
) -> Tensor:
    """Attention over rows `[B, T, H, D]` as one stream of B * T tokens; the state is reset at each document."""
    shape = q.shape[:2]
    q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    if log_decay is not None and log_decay.dim() > 1:
        log_decay = log_decay.reshape(1, -1, *log_decay.shape[2:])
    out, _ = linear_attention(q, k, v, log_decay=log_decay, cu_seqlens=cu_seqlens, **options)
    return out.view(*shape, *out.shape[2:])
