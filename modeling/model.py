"""The model: Llama 3 with linear attention in all or most layers.

Built from transformers' Llama modules and with Llama's weight names, so Llama weights load as they are. Under
a sequence-parallel context every rank passes its own shard of the batch (`context.shard_batch`) and the
attention layers, which alone mix tokens, exchange what they need.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from ..sequence_parallel.packing import document_edges, restarting_positions
from .attention import LinearLlama3Attention
from .buffers import LinearLlama3RotaryEmbedding
from .cache import CountingCache, ShardedCache, new_cache
from .configuration import LinearLlama3Config
from .generation import LinearLlama3GenerationMixin
from .hub import staged_save
from .inputs import (
    Mask,
    Masks,
    check_cache,
    check_shard,
    check_sharded_loss,
    layer_masks,
    padding_mask,
    positions_to_keep,
)
from .loss import check_skipped, loss_without_logits
from .mixers import LearnedFeatureMap, LinearAttention
from .model_card import add_card, provenance
from .tiling import Tiled

if TYPE_CHECKING:
    from ..sequence_parallel import SequenceParallelContext

logger = logging.get_logger(__name__)

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Keywords of `from_pretrained` that say where a file of a repository is."""


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

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """`[B, T, hidden]` -> `[B, T, hidden]`; the keywords go to the attention."""
        attention_output, _ = self.self_attn(self.in_tiles(self.input_layernorm, hidden_states), **kwargs)
        return self.in_tiles(self._feed_forward, hidden_states + attention_output)

    def _feed_forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LinearLlama3PreTrainedModel(PreTrainedModel):
    """What the base model and its heads share: initialisation, saving, and what transformers may do."""

    config: LinearLlama3Config
    config_class = LinearLlama3Config  # transformers reads the annotation, but here it is a string
    base_model_prefix = "model"
    model_tags = ["linear_llama3"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    provenance: dict[str, Any] | None = None  # what `from_pretrained` knows of it; see model_card.provenance
    _no_split_modules = ["LinearLlama3DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True  # with a static or a CountingCache
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LinearLlama3DecoderLayer,
        "attentions": LinearLlama3Attention,
    }

    @property
    def _is_stateful(self) -> bool:
        """Whether there is a recurrent state, which cannot be rolled back: transformers refuses assisted decoding."""
        return bool(self.config.linear_layers)

    @property
    def supports_context_parallel(self) -> bool:
        """True only while our own sequence parallelism is on, so that any other keeps refusing the model."""
        return self.base_model.sequence_parallel_context is not None

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing, for the reason given at `LinearLlama3Config.register_for_auto_class`."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LinearAttention):
            if module.mixer.constant_log_decay is not None:
                init.copy_(module.log_decay, module.constant_log_decay())
            if module.mixer.learned_decay:
                init.constant_(module.decay_bias, self.config.gate_bias_init)
        elif isinstance(module, LearnedFeatureMap):
            for name, value in module.initial().items():
                init.copy_(getattr(module, name), value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """Like `PreTrainedModel.from_pretrained`; remembers the licence of what was loaded, for the next card."""
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            model.provenance = provenance(str(pretrained_model_name_or_path), **hub)
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Like `PreTrainedModel.save_pretrained`; an interrupted save leaves the previous checkpoint whole.

        All files are written to a staging folder and moved when they are complete. With `push_to_hub=True`
        the upload comes before the move. A model card is among them, unless the folder has one of the user's.
        """
        save = super().save_pretrained
        # ranks that only take part in a gather write nothing; all write a distributed checkpoint at once
        if kwargs.get("distributed_checkpoint") or not self.should_save_on_this_rank(is_main_process):
            save(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        folder = Path(save_directory)
        if push_to_hub:
            kwargs.setdefault("repo_id", folder.name)
        with staged_save(folder, kwargs.get("variant")) as staging:
            save(staging, is_main_process, state_dict, push_to_hub, **kwargs)
            if not self._hf_peft_config_loaded:  # adapters alone are no model
                add_card(self, staging, folder.resolve().name)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """transformers' hook in both ways to push; it has just put a placeholder where the repository has no card."""
        if not self._hf_peft_config_loaded:
            add_card(self, Path(working_dir), repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


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

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[B, T, hidden]` for `input_ids` `[B, T]` or `inputs_embeds` `[B, T, hidden]`.

        `attention_mask`: `[B, past + T]`, 0 at padding, or the dictionary of masks that `generate` prepares.
        Packed batches are told by `cu_seq_lens_q` (edges in the B * T tokens read row by row) or by
        `position_ids` `[B, T]` that restart. `use_cache` is by default the config's, but off in training, for
        packed batches and under a sequence-parallel context.

        Under a context all tensors are this rank's shard, but `cu_seq_lens_q` speaks of the whole sequence.
        Raises `ValueError` for inputs that do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {given}")
        if kwargs.get("is_causal", self.config.is_causal) is not self.config.is_causal:
            raise ValueError(
                f"the model was made with config.is_causal={self.config.is_causal}, got is_causal="
                f"{kwargs['is_causal']}; leave is_causal out"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        cu_seq_lens = kwargs.pop("cu_seq_lens_q", None)
        cache_given = past_key_values is not None or bool(use_cache)
        if cache_given and not self.config.is_causal:
            raise ValueError(
                "a model with is_causal=False reads the whole sequence at once, got past_key_values or use_cache=True; "
                "leave them out"
            )
        if self.sequence_parallel_context is not None:
            check_shard(
                self.config,
                attention_mask,
                position_ids,
                cache_given=cache_given and not isinstance(past_key_values, ShardedCache),
                context=self.sequence_parallel_context,
                packed=cu_seq_lens is not None,
                kwargs=kwargs,
            )
            edges = cu_seq_lens
        elif past_key_values is not None and cu_seq_lens is None and (length == 1 or isinstance(attention_mask, dict)):
            edges = None  # a decoding step, or `generate` with its own masks, where positions jump at padding
        else:
            mask = padding_mask(self.config, attention_mask, length)
            edges = document_edges(position_ids, cu_seq_lens, mask, batch=batch, length=length)
        if edges is not None and cache_given:
            raise ValueError(
                f"a packed batch takes no cache, got {len(edges) - 1} documents with past_key_values or "
                "use_cache=True; set use_cache=False, or run the documents as rows of a padded batch"
            )
        past_key_values = self._prepare_cache(past_key_values, use_cache, packed=edges is not None)
        if position_ids is None and edges is not None:
            position_ids = restarting_positions(edges, batch=batch, length=length)
        elif position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)
        masks: Masks = {}
        if self.sequence_parallel_context is None:
            masks = layer_masks(self.config, inputs_embeds, attention_mask, position_ids, past_key_values, edges)
            if edges is not None:  # as transformers' flash attention wants to be told
                longest = int(edges.diff().max())
                kwargs.update(cu_seq_lens_k=edges, max_length_q=longest, max_length_k=longest)
        kwargs["cu_seq_lens_q"] = edges
        hidden_states = self._run_layers(inputs_embeds, masks, position_ids, past_key_values, kwargs)
        if isinstance(past_key_values, CountingCache):
            past_key_values.advance(length, inputs_embeds.device)
        hidden_states = self.in_tiles(self.norm, hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _run_layers(
        self,
        hidden_states: Tensor,
        masks: Masks,
        position_ids: Tensor,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        # what a layer exchanged in its forward pass, kept for the recomputation
        keep_exchanged = self.gradient_checkpointing and self.training and self.sequence_parallel_context is not None
        for layer, layer_type in zip(self.layers, self.config.layer_types or (), strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks.get(layer_type),
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                exchange_cache={} if keep_exchanged else None,
                **kwargs,
            )
        return hidden_states

    def _prepare_cache(self, cache: Cache | None, use_cache: bool | None, *, packed: bool) -> Cache | None:
        if self.gradient_checkpointing and self.training and (use_cache or cache is not None):
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

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
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
        if labels is not None and self.model.sequence_parallel_context is not None:
            check_sharded_loss(kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
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
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
