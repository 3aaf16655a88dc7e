"""Inputs of a forward pass: checks, masks for each layer type, and the positions whose logits are computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, create_recurrent_attention_mask
from transformers.utils import logging

from ..ops.documents import restarting_positions
from ..sequence_parallel import SequenceParallelContext
from .cache import RecurrentCache, ShardedCache
from .configuration import LinearLlama3Config
from .releases import CACHE_NAME

logger = logging.get_logger(__name__)

SHARD_FIRST = "call context.shard_batch(batch) first and pass all that it returns"
SWITCH_OFF = "switch sequence parallelism off with enable_sequence_parallel(model, None)"
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # their table depends on the longest position in the batch

IGNORED_KEYS = ("labels", "shift_labels", "token_type_ids")  # for the loss, or ignored by Llama models as well
FOREIGN_EDGE_KEYS = ("cu_seqlens", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens_k")  # fla's, Megatron's, flash-attn's

Masks = dict[str, Any]  # layer type -> mask: a Tensor, None, or the attention backend's own kind
Mask = Tensor | Masks | None


def check_direction(config: LinearLlama3Config, *, cache_given: bool, kwargs: dict[str, Any]) -> None:
    """Raise ValueError if a call contradicts `config.is_causal`."""
    if kwargs.get("is_causal", config.is_causal) is not config.is_causal:
        raise ValueError(
            f"the model was made with config.is_causal={config.is_causal}, got is_causal={kwargs['is_causal']}; "
            "leave is_causal out"
        )
    if cache_given and not config.is_causal:
        raise ValueError(
            "a model with is_causal=False reads the complete sequence at once, got a cache or use_cache=True; "
            "leave them out"
        )


def check_shard(
    config: LinearLlama3Config,
    attention_mask: Mask,
    position_ids: Tensor | None,
    *,
    cache_given: bool,
    context: SequenceParallelContext,
    documents: dict[str, Tensor | None],
    kwargs: dict[str, Any],
) -> None:
    """Raise ValueError for inputs that have no meaning on one rank's shard of a sequence."""
    if documents["seq_idx"] is not None:
        raise ValueError(
            "under sequence parallelism packed documents are described by cu_seq_lens_q of the complete sequence, got "
            f"seq_idx; {SHARD_FIRST}"
        )
    if cache_given:
        raise ValueError(
            "under sequence parallelism there is no cache, got a cache or use_cache=True; leave it out, or, "
            f"to generate, call prefill(model, input_ids), then {SWITCH_OFF}"
        )
    if position_ids is None:
        raise ValueError(f"under sequence parallelism every rank needs its own position_ids, got none; {SHARD_FIRST}")
    expected = context.positions(position_ids.shape[1], position_ids.device)
    fits = bool((position_ids - position_ids[:, :1] == expected - expected[0]).all())
    packed = any(x is not None for x in documents.values())
    if not packed and (not fits or (context.rank > 0 and bool((position_ids[:, 0] == 0).any()))):
        raise ValueError(
            f"under sequence parallelism position_ids are global, those of layout {context.layout!r}, and packed "
            f"documents are described by cu_seq_lens_q of the complete sequence, got {position_ids[0, :8].tolist()} on "
            f"rank {context.rank} without them; {SHARD_FIRST}"
        )
    if attention_mask is not None:
        raise ValueError(
            "under sequence parallelism the model takes no attention_mask, got one; call "
            "context.shard_batch(batch) first, which removes right padding from the labels"
        )
    if kwargs.get("output_attentions", config.output_attentions):
        raise ValueError(f"no rank holds the attention weights, got output_attentions=True; {SWITCH_OFF}")
    assert config.rope_parameters is not None
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"rope_type {rope_type!r} depends on the length of the input, which a rank does not know; "
            "choose another in config.rope_parameters, such as 'llama3' or 'yarn'"
        )


def check_loss(kwargs: dict[str, Any], *, sharded: bool, shifts: bool) -> None:
    """Raise ValueError if a forward pass with labels lacks what its loss needs.

    A shard contains neither the label after its end nor the number of all labels. `shifts`: each position predicts the
    next label.
    """
    count = kwargs.get("num_items_in_batch")
    if sharded and shifts and kwargs.get("shift_labels") is None:
        raise ValueError(
            "under sequence parallelism labels are shifted before the cut, got labels without shift_labels; "
            f"{SHARD_FIRST}"
        )
    if sharded and count is None:
        raise ValueError(
            "under sequence parallelism the loss needs num_items_in_batch, got none; pass the number of labels other "
            "than -100 in the complete batch (the mean over a shard is another number, and nan without labels)"
        )
    if isinstance(count, Tensor) and count.is_floating_point() and count.dtype.itemsize < 4:
        message = (
            f"num_items_in_batch must be exact, got {count.dtype}, which rounds counts or makes them infinite; pass an "
            "integer tensor or a Python number, as LinearLlama3Trainer does: FSDP2's mixed precision does not cast them"
        )
        if sharded:
            raise ValueError(message)
        logger.warning_once(message)  # transformers' own Trainer passes a float tensor, which FSDP2 casts


def check_unread(kwargs: dict[str, Any], batch: int, length: int) -> None:
    """Raise ValueError for keyword arguments that describe tokens or documents but that the model does not read.

    transformers' models accept any keyword argument. Names that Llama models often receive and ignore are allowed.
    """
    for name, x in kwargs.items():
        per_token = isinstance(x, Tensor) and x.shape[:2] == (batch, length) and name not in IGNORED_KEYS
        if x is not None and (per_token or name in FOREIGN_EDGE_KEYS):
            shape = f" of shape {tuple(x.shape)}" if isinstance(x, Tensor) else ""
            raise ValueError(
                f"the model does not read the keyword {name!r}, got one{shape}; leave it out, and describe packed "
                "documents by cu_seq_lens_q, restarting position_ids or seq_idx"
            )


def check_distribution(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for arguments of `from_pretrained` that would split weights of linear layers across devices."""
    asked = {name: kwargs[name] for name in ("tp_plan", "tp_size") if kwargs.get(name) is not None}
    if (config := kwargs.get("distributed_config")) is not None:
        read = config.get if isinstance(config, dict) else partial(getattr, config)
        asked |= {name: plan for name in ("tp_plan",) if (plan := read(name, None)) is not None}
        asked |= {name: size for name in ("tp_size", "pp_size") if (size := read(name, None) or 1) > 1}
    if asked:
        raise ValueError(
            "there is no tensor- or pipeline-parallel plan for linear layers, got "
            f"{', '.join(f'{name}={value!r}' for name, value in asked.items())}; leave it out. To spread long "
            "sequences use enable_sequence_parallel; to spread weights use FSDP or device_map"
        )


def check_cache(config: LinearLlama3Config, cache: Cache) -> None:
    """Raise ValueError unless a cache that the user passed has a place for every linear layer's state."""
    if not isinstance(cache, Cache):
        raise ValueError(
            f"{CACHE_NAME} must be a transformers Cache, got a {type(cache).__name__}; "
            "build it with DynamicCache(config=model.config), or pass no cache"
        )
    if not config.has_softmax_layers and not isinstance(cache, RecurrentCache | ShardedCache):
        raise ValueError(
            f"a model without softmax layers needs a RecurrentCache, got {type(cache).__name__}; "
            "use linear_llama3.modeling.RecurrentCache(model.config), or pass no cache"
        )
    for index in config.linear_layers:
        layer = cache.layers[index] if index < len(cache.layers) else None
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            raise ValueError(
                f"layer {index} is linear and keeps a state, got a {type(cache).__name__} without a place for it; "
                "build it with DynamicCache(config=model.config), or pass no cache"
            )


def padding_mask(config: LinearLlama3Config, attention_mask: Mask, length: int) -> Tensor | None:
    """Return the columns of a mask `[B, past + T]` that belong to these T tokens; None without such a mask.

    Raises:
        ValueError: the mask is too short, or not two-dimensional although there are linear layers.
    """
    if not isinstance(attention_mask, Tensor) or (attention_mask.dim() != 2 and not config.linear_layers):
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            "linear layers take an attention_mask [B, T] with 0 at padding, "
            f"got {tuple(attention_mask.shape)}; describe documents by cu_seq_lens_q or restarting position_ids"
        )
    if attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must cover all {length} tokens, got shape {tuple(attention_mask.shape)}; with a "
            "cache it must also cover the cached tokens"
        )
    return attention_mask[:, -length:]


def layer_masks(
    config: LinearLlama3Config,
    inputs_embeds: Tensor,
    attention_mask: Mask,
    position_ids: Tensor | None,
    cache: Cache | None,
    edges: Tensor | None,
) -> Masks:
    """Return one mask per layer type. Linear layers receive documents as edges, softmax layers as positions."""
    if isinstance(attention_mask, dict):
        return attention_mask
    batch, length = inputs_embeds.shape[:2]
    if edges is not None:
        attention_mask, position_ids = None, restarting_positions(edges, batch=batch, length=length)
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        CACHE_NAME: cache,
        "position_ids": position_ids,
    }
    masks: Masks = {}
    masked = config.has_softmax_layers and not (edges is not None and attends_by_document(config))
    if masked and config.is_causal:
        masks["full_attention"] = create_causal_mask(**arguments)
    elif masked:
        documents = None if edges is None else _same_document(edges, batch=batch, length=length)
        masks["full_attention"] = create_bidirectional_mask(
            config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, and_mask_function=documents
        )
    if attention_mask is not None and length == 1:
        # transformers drops the mask of a single token, but a chunked prefill may feed padding token by token
        masks["linear_attention"] = attention_mask[:, -1:].contiguous()  # the same strides in every step: one compile
    else:
        masks["linear_attention"] = create_recurrent_attention_mask(**arguments)
    return masks


def attends_by_document(config: LinearLlama3Config) -> bool:
    """True if softmax layers compute packed documents one by one: torch's attention would need a mask `[T, T]`."""
    return config._attn_implementation == "sdpa" and not config.attention_dropout


def _same_document(edges: Tensor, *, batch: int, length: int) -> Callable[..., Tensor]:
    """Return a mask function (row, head, query, key): in bidirectional masks transformers ignores documents."""
    document = torch.arange(len(edges) - 1, device=edges.device).repeat_interleave(edges.diff()).view(batch, length)
    return lambda row, head, query, key: document[row, query] == document[row, key]


def positions_to_keep(hidden_states: Tensor, keep: int | Tensor) -> Tensor:
    """Select the positions of transformers' `logits_to_keep` from `[B, T, hidden]`; its own helper is new in 5.21."""
    if isinstance(keep, int):
        return hidden_states[:, -keep:]
    if keep.dim() == 1:
        return hidden_states[:, keep]
    return hidden_states[keep] if keep.dtype == torch.bool else torch.take_along_dim(hidden_states, keep[..., None], 1)
