"""Linear attention layers: one module, and a table that says what makes each mixer itself."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from ..ops import linear_attention
from ..ops.decays import lightning_log_decay, retention_log_decay
from ..ops.feature_maps import FEATURE_MAPS
from ..ops.precision import working_dtype
from .buffers import ExactTensors
from .cache import ShardedCache, keep_state
from .tiling import Tiled

if TYPE_CHECKING:
    from ..sequence_parallel import SequenceParallelContext
    from .configuration import LinearLlama3Config

DECAY_RANK = 16  # inner width of the learned decay's projection, and
DECAY_TEMPERATURE = 16.0  # its divisor: both are GLA's (arXiv:2312.06635, section 4.4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixer:
    """What distinguishes one linear attention from another."""

    feature_map: str = "identity"
    key_head_dim: int | None = None  # channels of a head before the feature map; None: the config's head_dim
    constant_log_decay: Callable[[int, int, int], Tensor] | None = None  # (heads, layer, layers) -> [H_kv]
    learned_decay: bool = False  # per token, head and feature of the keys
    use_rope: bool = False
    normalize: bool = False  # divide by the sum of the weights; without it, an RMSNorm per head keeps the scale
    output_gate: str = "silu"  # activation of the gate on the output


def _retention_log_decay(num_heads: int, layer_idx: int, num_layers: int) -> Tensor:
    return retention_log_decay(num_heads)  # the same in every layer; named, so that a model can be pickled


MIXERS: dict[str, Mixer] = {
    "basic": Mixer(feature_map="silu"),
    "lightning": Mixer(feature_map="silu", constant_log_decay=lightning_log_decay, output_gate="sigmoid"),
    "retention": Mixer(constant_log_decay=_retention_log_decay, use_rope=True),
    "gla": Mixer(learned_decay=True),
    # Rebased's weights (q . k)^2 may all be near 0 at the first tokens of a document, where the quotient of sums over
    # expanded features then has but three digits in float32
    "based": Mixer(feature_map="taylor", key_head_dim=16, normalize=True),
    "rebased": Mixer(feature_map="rebased", key_head_dim=16, normalize=True),
}
"""Value of `config.linear_attention_type` -> mixer."""


class LearnedFeatureMap(nn.Module):
    """A feature map with the parameters of one layer's queries or keys."""

    def __init__(self, name: str, heads: int, dim: int) -> None:
        super().__init__()
        self.name, self.sizes = name, (heads, dim)
        for parameter, value in self.initial().items():
            self.register_parameter(parameter, nn.Parameter(value))

    def initial(self) -> dict[str, Tensor]:
        """Values of the parameters; asked for again after a build on the meta device."""
        return FEATURE_MAPS[self.name].parameters(*self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, H, D]` -> `[B, T, H, features]`."""
        return FEATURE_MAPS[self.name](x, **dict(self.named_parameters()))


class LinearAttention(Tiled, ExactTensors):
    """The attention of a linear layer, in the place and with the projections of Llama's softmax attention.

    `q, k` pass through feature map and rotary embedding, the state decays as the mixer says, the output is normalised
    (by the sum of the weights, or by an RMSNorm per head over D_v), gated, and projected. The decoding state
    `config.linear_state_shape` is float32 and lives in the cache's recurrent state of this layer.
    """

    layer_type = "linear_attention"
    exact_parameters = ("decay_bias",)

    def __init__(self, config: LinearLlama3Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.mixer = mixer = MIXERS[config.linear_attention_type]
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
            # not the projection's own bias: transformers lets only the owner of a parameter initialise it
            # float32 in a model of any dtype: near 6, bfloat16 values are 0.03 apart, more than any update
            initial = torch.full((features,), config.gate_bias_init)
            self.decay_bias = nn.Parameter(initial.to(working_dtype(initial)))
        if config.linear_output_gate:
            self.g_proj = nn.Linear(hidden, heads * self.value_dim, bias=False)
            self.gate_activation = ACT2FN[mixer.output_gate]
        if mixer.constant_log_decay is not None:
            # exact, as a rounded decay is another model
            self.log_decay = nn.Buffer(self.constant_log_decay(), persistent=False)

    def constant_log_decay(self) -> Tensor:
        """Value of the decay buffer, `[H_kv]` float32; asked for again after a build on the meta device."""
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
        """`hidden_states` `[B, T, hidden]` -> (the same shape, None: there are no attention weights).

        `attention_mask` `[B, T]` is 0 at padding. `cu_seq_lens_q` are the documents of the B * T tokens read
        row after row; under a sequence-parallel context, of the whole sequence. Further keywords are for
        softmax.
        """
        k, v, log_decay = self._keys_values(hidden_states, position_embeddings, attention_mask)
        kind: dict[str, Any] = {"normalize": self.mixer.normalize, "causal": self.is_causal}
        if self.sequence_parallel_context is not None:
            attend: Callable[[Tensor], Tensor] = self._start_sharded(
                k, v, cache,
                log_decay=log_decay,
                cu_seqlens=cu_seq_lens_q,
                exchange_cache=exchange_cache,
                **kind,
            )  # fmt: skip
        elif cu_seq_lens_q is not None:
            attend = partial(_attend_packed, k=k, v=v, log_decay=log_decay, cu_seqlens=cu_seq_lens_q, **kind)
        else:
            attend = partial(self._attend_cached, k=k, v=v, log_decay=log_decay, cache=cache, **kind)
        # under a context the states travel while these are projected
        q = self._queries(hidden_states, position_embeddings)
        gate = None if self.sequence_tiling else self._gate(hidden_states)
        out = attend(q.to(v.dtype))
        out = out.to(hidden_states.dtype) if self.mixer.normalize else out
        if self.sequence_tiling:
            return self.in_tiles(lambda out, x: self._output(out, self._gate(x)), out, hidden_states), None
        return self._output(out, gate), None

    def _gate(self, x: Tensor) -> Tensor | None:
        return self.gate_activation(self.g_proj(x)) if self.config.linear_output_gate else None

    def _output(self, out: Tensor, gate: Tensor | None) -> Tensor:
        """`[B, T, H, D_v]` -> `[B, T, hidden]`."""
        out = self.o_norm(out) if self.config.uses_linear_output_norm else out
        out = out.flatten(2)
        return self.o_proj(out if gate is None else out * gate)

    def _queries(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        return self._place(self.q_feature_map(_heads(self.q_proj(x), self.num_heads)), position_embeddings)

    def _keys_values(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        v = _heads(self.v_proj(x), self.num_kv_heads)
        if self.mixer.normalize:
            v = v.to(working_dtype(v))  # products of rounded features cancel in a quotient of sums
        k = self._place(self.k_feature_map(_heads(self.k_proj(x), self.num_kv_heads)), position_embeddings).to(v.dtype)
        log_decay = self._log_decay(x)
        if mask is not None:
            # padding must neither write to the state (after the feature map: phi(0) may be > 0) nor fade it
            keep = (mask != 0)[:, :, None]  # bool: mask values must not scale keys
            k = k * keep[..., None]
            if log_decay is not None:
                log_decay = log_decay * (keep if log_decay.dim() == 1 else keep[..., None])
        return k, v, log_decay

    def _place(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Rotates queries or keys `[B, T, H, D_k]`, after the feature map: scores then depend on relative positions
        (RoFormer, arXiv:2104.09864). Under autocast the rotary table, and so the result, is float32."""
        if not self.config.uses_linear_rope:
            return x
        cos, sin = (table.unsqueeze(2) for table in position_embeddings)
        return x * cos + rotate_half(x) * sin

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """None, `[H_kv]` or, for every feature, `[B, T, H_kv, D_k]`, at least float32."""
        if self.mixer.constant_log_decay is not None:
            return self.log_decay
        if not self.mixer.learned_decay:
            return None
        gate = self.decay_up_proj(self.decay_down_proj(x)) + self.decay_bias
        gate = gate.to(working_dtype(gate))
        return (F.logsigmoid(gate) / DECAY_TEMPERATURE).view(*x.shape[:2], self.num_kv_heads, -1)

    def _attend_cached(
        self, q: Tensor, *, k: Tensor, v: Tensor, log_decay: Tensor | None, cache: Cache | None, **kind: Any
    ) -> Tensor:
        if cache is None:
            return linear_attention(q, k, v, log_decay=log_decay, **kind)[0]
        layer = cache.layers[self.layer_idx]
        assert isinstance(layer, LinearAttentionCacheLayerMixin)
        out, state = linear_attention(
            q, k, v,
            log_decay=log_decay,
            initial_state=layer.recurrent_states[0] if layer.has_previous_state[0] else None,
            output_final_state=True,
            **kind,
        )  # fmt: skip
        assert state is not None
        keep_state(cache, state, self.layer_idx)
        return out

    def _start_sharded(self, k: Tensor, v: Tensor, cache: Cache | None, **options: Any) -> Callable[[Tensor], Tensor]:
        """Attention under a context; in a prefill, the state after this rank's tokens goes to the cache."""
        assert self.sequence_parallel_context is not None
        start = self.sequence_parallel_context.start_linear_attention
        if cache is None:
            return start(k, v, **options)
        assert isinstance(cache, ShardedCache)
        started = start(k, v, length=cache.length, output_final_state=True, **options)

        def attend(q: Tensor) -> Tensor:
            out = started(q)
            assert started.final_state is not None
            keep_state(cache, started.final_state, self.layer_idx)
            return out

        return attend


def _heads(x: Tensor, heads: int) -> Tensor:
    """`[B, T, H * D]` to `[B, T, H, D]`."""
    return x.unflatten(-1, (heads, -1))


def _attend_packed(
    q: Tensor, *, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor, **kind: Any
) -> Tensor:
    """Rows `[B, T, H, D]` as one stream of B * T tokens, the state starting anew at each document."""
    shape = q.shape[:2]
    q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    if log_decay is not None and log_decay.dim() > 1:
        log_decay = log_decay.reshape(1, -1, *log_decay.shape[2:])
    out, _ = linear_attention(q, k, v, log_decay=log_decay, cu_seqlens=cu_seqlens, **kind)
    return out.view(*shape, *out.shape[2:])
