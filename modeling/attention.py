"""The softmax layers: transformers' Llama attention, or our own for packed documents and under a context."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, rotate_half

from ..sequence_parallel import softmax_attention
from .inputs import attends_by_document
from .releases import CACHE_NAME

if TYPE_CHECKING:
    from ..sequence_parallel import SequenceParallelContext
    from .configuration import LinearLlama3Config


class LinearLlama3Attention(LlamaAttention):
    """Softmax attention on transformers' backends; under a context, keys and values are exchanged.

    Where torch's attention is the backend (`attn_implementation="sdpa"`, the default), packed documents are attended to
    in blocks, without a mask of T x T.
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
        """`hidden_states` `[B, T, hidden]` -> (the same shape, attention weights or None).

        `exchange_cache`: as in `sequence_parallel.softmax_attention`. Raises `ValueError` for dropout under a
        context: ranks would drop different weights than one device.
        """
        context = self.sequence_parallel_context
        if context is None and (cu_seq_lens_q is None or not attends_by_document(self.config)):
            cos, sin = (table.to(hidden_states.dtype) for table in position_embeddings)  # as transformers has them
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
        # by hand: Liger puts a function for [B, H, T, D] in the place of transformers' apply_rotary_pos_emb
        cos, sin = (table.unsqueeze(2) for table in position_embeddings)
        q, k = (x * cos + rotate_half(x) * sin for x in (q, k))
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
        kind: dict[str, Any] = {"scale": self.scaling, "cu_seqlens": cu_seq_lens_q, "causal": self.is_causal}
        if context is not None:
            out = context.softmax_attention(q, k, v, exchange_cache=exchange_cache, **kind)
        else:  # rows are one stream of documents
            out = softmax_attention(*(x.flatten(0, 1).unsqueeze(0) for x in (q, k, v)), group=None, **kind)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None
