"""The model: Llama 3 with linear attention in all or most layers.

Built from transformers' Llama modules and with Llama's weight names, so Llama weights load as they are. Under
a sequence-parallel context every rank passes its own shard of the batch (`context.shard_batch`) and the
attention layers, which alone mix tokens, exchange what they need.
"""

from __future__ import annotations

from collections import UserDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from ..ops.documents import DOCUMENT_KEYS, check_mask, document_edges, restarting_positions
from .buffers import LinearLlama3RotaryEmbedding, as_integers
from .cache import CountingCache, ShardedCache, new_cache
from .configuration import LinearLlama3Config
from .generation import LinearLlama3GenerationMixin
from .inputs import (
    Mask,
    Masks,
    check_cache,
    check_loss,
    check_shard,
    check_unread,
    layer_masks,
    padding_mask,
    positions_to_keep,
)
from .layer import LinearLlama3DecoderLayer
from .loss import check_skipped, loss_without_logits
from .pretrained import LinearLlama3PreTrainedModel
from .releases import CACHE_NAME, cache_keyword
from .tiling import Tiled

if TYPE_CHECKING:
    from ..sequence_parallel import SequenceParallelContext

logger = logging.get_logger(__name__)


class LinearLlama3Model(Tiled, LinearLlama3PreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: LinearLlama3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [LinearLlama3DecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LinearLlama3RotaryEmbedding(config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.sequence_parallel_context: SequenceParallelContext | None = None
        self.post_init()

    @cache_keyword
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[B, T, hidden]` for `input_ids` `[B, T]` or `inputs_embeds` `[B, T, hidden]`.

        `attention_mask`: `[B, past + T]`, 0 at padding and 1 elsewhere, or the dictionary of masks that `generate`
        prepares. Packed batches are described by `cu_seq_lens_q` or `cu_seq_lens_k` (edges in the B * T tokens read row
        by row), by `position_ids` `[B, T]` that restart, or by `seq_idx` `[B, T]` (each token's document number). Any
        one of them is enough. `use_cache` defaults to the config's value, but is off in training, for packed batches
        and under a sequence-parallel context.

        Under a context all tensors are this rank's shard, but `cu_seq_lens_q` speaks of the whole sequence.
        Raises `ValueError` for inputs that do not fit together, or that the model does not read.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {given}")
        if kwargs.get("is_causal", self.config.is_causal) is not self.config.is_causal:
            raise ValueError(
                f"the model was made with config.is_causal={self.config.is_causal}, got is_causal="
                f"{kwargs['is_causal']}; leave is_causal out"
            )
        check_mask(attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        documents = {name: kwargs.pop(name, None) for name in DOCUMENT_KEYS}
        described = any(x is not None for x in documents.values())
        check_unread(kwargs, batch, length)
        cache_given = cache is not None or bool(use_cache)
        if cache_given and not self.config.is_causal:
            raise ValueError(
                "a model with is_causal=False reads the complete sequence at once, got a cache or use_cache=True; "
                "leave them out"
            )
        if self.sequence_parallel_context is not None:
            check_shard(
                self.config,
                attention_mask,
                position_ids,
                cache_given=cache_given and not isinstance(cache, ShardedCache),
                context=self.sequence_parallel_context,
                documents=documents,
                kwargs=kwargs,
            )
            edges = next((x for x in documents.values() if x is not None), None)
        elif cache is not None and not described and (length == 1 or isinstance(attention_mask, dict)):
            edges = None  # a decoding step, or `generate` with its own masks, where positions jump at padding
        else:
            mask = padding_mask(self.config, attention_mask, length)
            edges = document_edges({**documents, "position_ids": position_ids}, mask, batch=batch, length=length)
        if edges is not None and cache_given:
            raise ValueError(
                f"a packed batch takes no cache, got {len(edges) - 1} documents with a cache or "
                "use_cache=True; set use_cache=False, or run the documents as rows of a padded batch"
            )
        cache = self._prepare_cache(cache, use_cache, packed=edges is not None)
        if position_ids is None and edges is not None:
            position_ids = restarting_positions(edges, batch=batch, length=length)
        elif position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)
        masks: Masks = {}
        if self.sequence_parallel_context is None:
            masks = layer_masks(self.config, inputs_embeds, attention_mask, position_ids, cache, edges)
            if edges is not None:  # as transformers' flash attention expects
                longest = int(edges.diff().max())
                kwargs.update(cu_seq_lens_k=edges, max_length_q=longest, max_length_k=longest)
        kwargs["cu_seq_lens_q"] = edges
        hidden_states = self._run_layers(inputs_embeds, masks, position_ids, cache, kwargs)
        if isinstance(cache, CountingCache):
            cache.advance(length, inputs_embeds.device)
        hidden_states = self.in_tiles(self.norm, hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    def _run_layers(
        self,
        hidden_states: Tensor,
        masks: Masks,
        position_ids: Tensor,
        cache: Cache | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        position_embeddings = tuple(map(as_integers, self.rotary_emb(hidden_states, position_ids=position_ids)))
        # Keep what a layer exchanged in its forward pass for the recomputation. Not in a dict: FSDP2 passes each layer
        # copies of its dict arguments.
        keep_exchanged = self.gradient_checkpointing and self.training and self.sequence_parallel_context is not None
        for layer, layer_type in zip(self.layers, self.config.layer_types or (), strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks.get(layer_type),
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                cache=cache,
                exchange_cache=UserDict() if keep_exchanged else None,
                **kwargs,
            )
        return hidden_states

    def _prepare_cache(self, cache: Cache | None, use_cache: bool | None, *, packed: bool) -> Cache | None:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError(
                    "gradient checkpointing recomputes each layer in the backward pass, when the cache has changed, "
                    f"got a {type(cache).__name__}; pass the complete sequence without a cache, or call "
                    "model.gradient_checkpointing_disable() or model.eval()"
                )
            if use_cache:
                logger.warning_once("`use_cache=True` is incompatible with gradient checkpointing. Set to False.")
                return None
        if use_cache is None:
            use_cache = (
                self.config.use_cache and self.config.is_causal and not self.training and not packed
                and self.sequence_parallel_context is None
            )  # fmt: skip
        if cache is None:
            if not use_cache:
                return None
            return new_cache(self.config)
        check_cache(self.config, cache)
        return cache


class LinearLlama3ForCausalLM(LinearLlama3PreTrainedModel, LinearLlama3GenerationMixin):
    """The model with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: LinearLlama3Config) -> None:
        super().__init__(config)
        if not config.is_causal:
            raise ValueError(
                "a causal language model predicts the next token, got config.is_causal=False; use "
                "LinearLlama3ForMaskedLM or set is_causal=True"
            )
        self.model = LinearLlama3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @cache_keyword
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, T, vocab]`, and the loss if `labels` `[B, T]` are given (-100 is ignored).

        `shift_labels` and `num_items_in_batch` go to the loss: sum over the local labels / the count. Under a
        sequence-parallel context both are required with `labels`, since neither the next label nor the mean
        can be had from one shard. `logits_to_keep`: the last n positions, positions 1-D or per row, or a mask
        `[B, T]`. `skip_logits` gives the same loss without logits, which are never held for all tokens.
        """
        if skip_logits:
            check_skipped(labels, logits_to_keep)
        if labels is not None:
            check_loss(kwargs, sharded=self.model.sequence_parallel_context is not None, shifts=True)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            return_dict=True,  # whatever the config says
            **kwargs,
        )
        logits = loss = None
        if skip_logits:
            loss = loss_without_logits(self, outputs.last_hidden_state, labels, shift=True, **kwargs)
        else:
            logits = self.lm_head(positions_to_keep(outputs.last_hidden_state, logits_to_keep))
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
