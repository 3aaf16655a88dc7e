"""Softmax attention: transformers' Llama attention; our own for packed documents and under sequence parallelism."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, rotate_half

from ..sequence_parallel import SequenceParallelContext, softmax_attention
from .configuration import LinearLlama3Config
from .inputs import attends_by_document
from .releases import CACHE_NAME


class LinearLlama3Attention(LlamaAttention):
    """Softmax attention on transformers' backends; under a context, ranks exchange keys and values.

    With torch's attention as the backend (`attn_implementation="sdpa"`, the default), packed documents are computed
    one by one, without a mask `[T, T]`.
    """

    layer_type = "full_attention"

    def __init__(self, config: LinearLlama3Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        self.is_causal = config.is_causal
        self.sequence_parallel_context: SequenceParallelContext | None = None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        cu_seq_lens_q: Tensor | None = None,
        exchange_cache: MutableMapping[str, Any] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output `[B, T, hidden]` for `hidden_states` of the same shape, and attention weights or None.

        Args:
            position_embeddings: cosines and sines `[B, T, D]`, in float32 or float64.
            cu_seq_lens_q: document edges `[N + 1]` in the B * T tokens read row by row; under a context, in the
                complete sequence.
            exchange_cache: see `sequence_parallel.softmax_attention`.
            cache: receives the keys and values.

        Raises:
            ValueError: dropout in training under a context, where ranks would drop other weights than one device.
        """
        context = self.sequence_parallel_context
        if context is None and (cu_seq_lens_q is None or not attends_by_document(self.config)):
            cos, sin = (table.to(hidden_states.dtype) for table in position_embeddings)  # as transformers expects
            return super().forward(
                hidden_states,
                position_embeddings=(cos, sin),
                cu_seq_lens_q=cu_seq_lens_q,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        if self.training and self.attention_dropout:
            raise ValueError(
                f"attention_dropout must be 0 in sequence-parallel training, got {self.attention_dropout}; "
                "set config.attention_dropout=0.0"
            )
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(hidden_states).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        # not apply_rotary_pos_emb of transformers: Liger replaces it by a function for [B, H, T, D]
        cos, sin = (table.unsqueeze(2) for table in position_embeddings)
        q, k = (x * cos + rotate_half(x) * sin for x in (q, k))
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
        options: dict[str, Any] = {"scale": self.scaling, "cu_seqlens": cu_seq_lens_q, "causal": self.is_causal}
        if context is not None:
            out = context.softmax_attention(q, k, v, exchange_cache=exchange_cache, **options)
        else:  # the rows form one stream of documents
            out = softmax_attention(*(x.flatten(0, 1).unsqueeze(0) for x in (q, k, v)), group=None, **options)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None
