"""The model: Llama 3 with linear attention in all or most layers.

It is built from transformers' Llama modules with Llama's weight names, so Llama weights load as they are. Under a
sequence-parallel context every rank passes its own shard of the batch (`context.shard_batch`). Only attention layers
mix tokens, so only they communicate.
"""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from ..ops.documents import DOCUMENT_KEYS, check_mask, document_edges, restarting_positions
from ..sequence_parallel import SequenceParallelContext
from .cache import RecurrentCache, ShardedCache, new_cache
from .configuration import LinearLlama3Config
from .decoder_layer import LinearLlama3DecoderLayer
from .generation import LinearLlama3GenerationMixin
from .inputs import (
    Mask,
    Masks,
    check_cache,
    check_direction,
    check_loss,
    check_shard,
    check_unread,
    layer_masks,
    padding_mask,
    positions_to_keep,
)
from .layers import LinearLlama3RotaryEmbedding, Tiled, as_integers
from .loss import check_skip_logits, chunked_loss
from .pretrained import LinearLlama3PreTrainedModel
from .releases import CACHE_NAME, cache_keyword

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
        """Return hidden states `[B, T, hidden]` for `input_ids` `[B, T]` or `inputs_embeds` `[B, T, hidden]`.

        Packed batches are described by any one of `cu_seq_lens_q` or `cu_seq_lens_k` (document edges int `[N + 1]` in
        the B * T tokens read row by row), `position_ids` that restart, and `seq_idx` int `[B, T]` (a number for each
        document). Under a context all tensors are this rank's shard, but `cu_seq_lens_q` has the edges of the complete
        sequence.

        Args:
            attention_mask: `[B, past + T]`, 0 at padding and 1 elsewhere, or the masks that `generate` prepares.
            position_ids: int `[1 or B, T]`; required under a context.
            cache: keys, values and states of the previous tokens.
            use_cache: defaults to the config's value; off in training, for packed batches and under a context.

        Raises:
            ValueError: inputs contradict each other, or are not read by the model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {given}")
        check_direction(self.config, cache_given=cache is not None or bool(use_cache), kwargs=kwargs)
        check_mask(attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        edges = self._resolve_documents(inputs_embeds, attention_mask, position_ids, cache, use_cache, kwargs)
        cache = self._resolve_cache(cache, use_cache, packed=edges is not None)
        position_ids = self._resolve_positions(inputs_embeds, position_ids, cache, edges)
        masks: Masks = {}
        if self.sequence_parallel_context is None:
            masks = layer_masks(self.config, inputs_embeds, attention_mask, position_ids, cache, edges)
            if edges is not None:  # as transformers' flash attention expects
                longest = int(edges.diff().max())
                kwargs.update(cu_seq_lens_k=edges, max_length_q=longest, max_length_k=longest)
        kwargs["cu_seq_lens_q"] = edges
        position_embeddings = tuple(map(as_integers, self.rotary_emb(inputs_embeds, position_ids=position_ids)))
        # The recomputation reuses what a layer exchanged in its forward pass. A UserDict, since FSDP2 passes copies of
        # dict arguments to a layer.
        keep_exchanged = self.gradient_checkpointing and self.training and self.sequence_parallel_context is not None
        hidden_states = inputs_embeds
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
        if isinstance(cache, RecurrentCache):
            cache.advance(inputs_embeds.shape[1], inputs_embeds.device)
        hidden_states = self.in_tiles(self.norm, hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    def _resolve_documents(
        self,
        inputs_embeds: Tensor,
        attention_mask: Mask,
        position_ids: Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Return the document edges `[N + 1]`, None for a batch that is not packed; take their description out of
        `kwargs`."""
        batch, length = inputs_embeds.shape[:2]
        documents = {name: kwargs.pop(name, None) for name in DOCUMENT_KEYS}
        described = any(x is not None for x in documents.values())
        check_unread(kwargs, batch, length)
        cache_given = cache is not None or bool(use_cache)
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
            edges = None  # a decoding step, or masks of `generate`: positions jump at padding
        else:
            mask = padding_mask(self.config, attention_mask, length)
            edges = document_edges({**documents, "position_ids": position_ids}, mask, batch=batch, length=length)
        if edges is not None and cache_given:
            raise ValueError(
                f"a packed batch takes no cache, got {len(edges) - 1} documents with a cache or "
                "use_cache=True; set use_cache=False, or run the documents as rows of a padded batch"
            )
        return edges

    def _resolve_positions(
        self, inputs_embeds: Tensor, position_ids: Tensor | None, cache: Cache | None, edges: Tensor | None
    ) -> Tensor:
        """Return the given positions; without them, count from each document's start or from the cached tokens."""
        if position_ids is not None:
            return position_ids
        batch, length = inputs_embeds.shape[:2]
        if edges is not None:
            return restarting_positions(edges, batch=batch, length=length)
        past = cache.get_seq_length() if cache is not None else 0
        return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)

    def _resolve_cache(self, cache: Cache | None, use_cache: bool | None, *, packed: bool) -> Cache | None:
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


class LanguageModel(LinearLlama3PreTrainedModel):
    """Base class of the language models: `LinearLlama3Model` with a head that predicts tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012
    shifts_labels: bool  # True: position t predicts label t + 1
    _rule: str  # why `config.is_causal` must equal `shifts_labels`
    _remedy: str

    def __init__(self, config: LinearLlama3Config) -> None:
        super().__init__(config)
        if config.is_causal is not self.shifts_labels:
            raise ValueError(f"{self._rule}, got config.is_causal={config.is_causal}; {self._remedy}")
        self.model = LinearLlama3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _predict(
        self, inputs: dict[str, Any], labels: Tensor | None, kwargs: dict[str, Any], *, skip_logits: bool,
        logits_to_keep: int | Tensor = 0,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        """Return the model's outputs for `inputs`, and the fields that every language model returns."""
        if skip_logits:
            check_skip_logits(labels, logits_to_keep)
        if labels is not None:
            check_loss(kwargs, sharded=self.model.sequence_parallel_context is not None, shifts=self.shifts_labels)
        outputs = self.model(**inputs, **kwargs, return_dict=True)  # also if config.return_dict is False
        logits = loss = None
        if skip_logits:
            loss = chunked_loss(self, outputs.last_hidden_state, labels, shift=self.shifts_labels, **kwargs)
        else:
            logits = self.lm_head(positions_to_keep(outputs.last_hidden_state, logits_to_keep))
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        fields = {"loss": loss, "logits": logits, "hidden_states": outputs.hidden_states}
        return outputs, fields | {"attentions": outputs.attentions}


class LinearLlama3ForCausalLM(LanguageModel, LinearLlama3GenerationMixin):
    """The causal language model: `LinearLlama3Model` with a head for the next token."""

    shifts_labels = True
    _rule = "a causal language model predicts the next token"
    _remedy = "use LinearLlama3ForMaskedLM or set is_causal=True"

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
        """Return logits `[B, T, vocab]`, and the loss if `labels` `[B, T]` are given (-100 is ignored).

        Args:
            labels: the tokens themselves; position t predicts label t + 1, or label t of `shift_labels` `[B, T]`.
            logits_to_keep: compute logits for the last n positions, for positions `[n]` or `[B, n]`, or where a mask
                `[B, T]` is True. 0 means all.
            skip_logits: return the same loss without logits (`chunked_loss`).
            kwargs: arguments of `LinearLlama3Model.forward` and of the loss. `num_items_in_batch`: the loss is the sum
                over the local labels divided by this count. Under a context, `labels` need `shift_labels` and
                `num_items_in_batch`, because a shard contains neither the next label nor all labels.

        Raises:
            ValueError: arguments contradict each other, or the loss lacks one.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            CACHE_NAME: cache,
        }
        outputs, fields = self._predict(inputs, labels, kwargs, skip_logits=skip_logits, logits_to_keep=logits_to_keep)
        return CausalLMOutputWithPast(**fields, **{CACHE_NAME: outputs.get(CACHE_NAME)})
