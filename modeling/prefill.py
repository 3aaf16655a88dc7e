"""Prefill of long prompts: all ranks compute the cache under sequence parallelism, one rank receives it to decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ..ops.documents import check_mask
from ..sequence_parallel import SequenceParallelContext
from ..sequence_parallel.collectives import fingerprints
from ..sequence_parallel.gather import gather_to_rank, send_final_state
from .cache import RecurrentCache, ShardedCache, new_cache, store_state
from .releases import CACHE_NAME


@torch.no_grad()
def prefill(
    model: PreTrainedModel, input_ids: Tensor, *, attention_mask: Tensor | None = None, dst: int = 0
) -> DynamicCache | None:
    """Return the cache of a prompt, computed by all ranks of the model's context, for `generate` on one rank.

    Every rank calls this function with the same arguments. The cache contains all tokens except the last, whose logits
    `generate` computes itself. Pass the complete prompt to `generate`, or a longer one that begins with it.

        enable_sequence_parallel(model, context)
        cache = prefill(model, input_ids)
        enable_sequence_parallel(model, None)
        if cache is not None:
            model.generate(input_ids, cache=cache)  # past_key_values=cache before transformers 5.24

    For n beams or n returned sequences, first call `cache.reorder_cache(torch.arange(B).repeat_interleave(n))`. During
    the forward pass, each rank keeps only the keys and values of its local tokens. Rank `dst` then gathers them
    layer by layer.

    Args:
        model: in evaluation mode, with sequence parallelism enabled.
        input_ids: the complete prompts int `[B, T]`, all of one length.
        attention_mask: `[B, T]`, all ones; required if prompts contain the padding token.
        dst: the rank of the group that receives the cache.

    Returns:
        On rank `dst` the cache of T - 1 tokens, equal to that of a single device; None on the others.

    Raises:
        ValueError: the model has no context, is in training mode or does not generate; prompts are padded or differ
            between ranks; the rank is unknown.
    """
    context = _active_context(model)
    _check_prompt(model, input_ids, attention_mask)
    if not 0 <= dst < context.world_size:
        raise ValueError(f"dst must be a rank of the group, 0 to {context.world_size - 1}, got {dst}")
    if context.group is not None and len(set(fingerprints(F.pad(input_ids, (0, 1), value=dst), context.group))) > 1:
        raise ValueError(
            f"all ranks prefill the same prompt for the same dst, rank {context.rank} of {context.world_size} got "
            "other input_ids or another dst than its peers; broadcast the prompt, or seed all loaders alike"
        )
    cache = new_cache(model.config) if context.rank == dst else None
    length = input_ids.shape[1] - 1
    if length > 0:
        shards = ShardedCache(model.config, length)
        model(**context.shard_batch({"input_ids": input_ids[:, :-1]}), logits_to_keep=1, **{CACHE_NAME: shards})
        _gather_cache(shards, cache, context, dst, input_ids.device)
    return cache


def _gather_cache(
    shards: ShardedCache, cache: DynamicCache | None, context: SequenceParallelContext, dst: int, device: torch.device
) -> None:
    """Fill the cache of rank `dst` layer by layer. A rank frees its part of a layer after sending it."""
    options: dict[str, Any] = {"group": context.group, "layout": context.layout, "dst": dst}
    for index, layer in enumerate(shards.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            state = send_final_state(layer.recurrent_states.pop(0), **options)
            if cache is not None and state is not None:
                store_state(cache, state, index)
        else:
            keys = gather_to_rank(layer.keys, length=shards.length, dim=2, **options)
            values = gather_to_rank(layer.values, length=shards.length, dim=2, **options)
            layer.keys = layer.values = None
            if cache is not None:
                cache.update(keys, values, index)
    if isinstance(cache, RecurrentCache):
        cache.advance(shards.length, device)


def _active_context(model: nn.Module) -> SequenceParallelContext:
    """Return the context of the attention layers, which may be anywhere in `model`."""
    for module in model.modules():
        context = getattr(module, "sequence_parallel_context", None)
        if context is not None:
            return context
    raise ValueError(
        f"prefill shards a prompt over the ranks of a sequence-parallel context, got a {type(model).__name__} without "
        "one; call enable_sequence_parallel(model, context) first, or let generate prefill on one device"
    )


def _check_prompt(model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None) -> None:
    if not model.can_generate():
        raise ValueError(
            f"prefill computes a cache for generate, got a {type(model).__name__}, which does not generate; "
            "use a LinearLlama3ForCausalLM"
        )
    if model.training:
        raise ValueError("prefill needs a model in evaluation mode, got one in training mode; call model.eval()")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"prefill takes prompts [B, T] of at least one token, got shape {tuple(input_ids.shape)}")
    generation = model.generation_config
    assert generation is not None
    padding, ends = generation.pad_token_id, generation.eos_token_id
    if mask is None and padding is not None and padding not in (ends if isinstance(ends, list) else [ends]):
        mask = input_ids != padding  # as generate does without a mask
    check_mask(mask)
    if mask is not None and (mask.shape != input_ids.shape or not bool(mask.all())):
        raise ValueError(
            f"prefill takes prompts of one length, got padding in {tuple(input_ids.shape)} input_ids; prefill prompts "
            "of other lengths one by one, and pass an attention_mask of ones if prompts contain the padding token"
        )
