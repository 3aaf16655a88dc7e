"""Generation with linear layers: their cache and masks, and errors for methods that need to roll back a state."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode

from ..ops.documents import check_mask
from .cache import RecurrentCache, new_cache
from .configuration import LinearLlama3Config
from .inputs import SWITCH_OFF, Masks, layer_masks
from .releases import CACHE_NAME, CHUNKS_CACHED_TOKENS, cache_keyword, version


class LinearLlama3GenerationMixin(GenerationMixin):
    """transformers' generation; unsupported methods raise an error that gives the remedy."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Create the cache of a model with linear layers (a hook of transformers).

        Raises:
            ValueError: sequence parallelism is on, or the model does not support the requested cache.
        """
        if self.base_model.sequence_parallel_context is not None:
            raise ValueError(f"one rank's shard cannot generate, got generate() under a context; {SWITCH_OFF}")
        wants_cache = generation_config.use_cache and model_kwargs.get(CACHE_NAME) is None
        implementation = generation_config.cache_implementation
        if wants_cache and not self.config.has_softmax_layers:
            if implementation not in (None, "dynamic", "static"):
                raise ValueError(
                    "a model without softmax layers keeps a state of fixed size, got "
                    f"cache_implementation={implementation!r}; leave cache_implementation out, or give 'static' to "
                    "compile the decoding step"
                )
            model_kwargs[CACHE_NAME] = RecurrentCache(self.config, static=implementation == "static")
        elif wants_cache and implementation in (None, "dynamic"):
            model_kwargs[CACHE_NAME] = new_cache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @staticmethod
    @cache_keyword
    def create_masks_for_generate(
        config: LinearLlama3Config,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Masks:
        """Return the masks for a static cache, made outside the compiled step (a hook of transformers)."""
        check_mask(attention_mask)
        return layer_masks(config, inputs_embeds, attention_mask, position_ids, cache, edges=None)

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Run the prompt (a hook of transformers).

        Raises:
            ValueError: transformers would fail, or give wrong tokens.
        """
        if generation_config.is_assistant and self._is_stateful:
            raise ValueError(
                "an assistant takes back rejected tokens, but a recurrent state cannot be rolled back, got "
                f"assistant_model with {len(self.config.linear_layers)} linear layers; take one whose layers are all "
                "softmax"
            )
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                f"a chunked prefill cuts input_ids, got prefill_chunk_size={generation_config.prefill_chunk_size} with "
                "inputs_embeds; leave prefill_chunk_size out"
            )
        cache, embeds = model_kwargs.get(CACHE_NAME), model_kwargs.get("inputs_embeds")
        seen = 0 if cache is None or embeds is not None else int(cache.get_seq_length())
        if seen and seen >= input_ids.shape[1]:
            raise ValueError(
                "generate() asks for the logits of the prompt's last token, which must not be in the cache yet, got a "
                f"cache of {seen} tokens for a prompt of {input_ids.shape[1]}; compute it from input_ids[:, :-1]"
            )
        if seen and generation_config.prefill_chunk_size is not None and CHUNKS_CACHED_TOKENS:
            raise ValueError(
                f"a chunked prefill of transformers {version} counts cached tokens twice, got prefill_chunk_size="
                f"{generation_config.prefill_chunk_size} with a cache of {seen} tokens; leave prefill_chunk_size out, "
                "or install a newer release of transformers"
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Start continuous batching of a model whose layers are all softmax.

        Raises:
            ValueError: the model has linear layers, for which transformers keeps no state here.
        """
        if self._is_stateful:
            raise ValueError(
                f"continuous batching keeps keys and values in pages, got {len(self.config.linear_layers)} linear "
                "layers, which have a state instead; call generate() with a left-padded batch"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def _get_deprecated_gen_repo(self, generation_mode: GenerationMode, *args: Any, **kwargs: Any) -> str | None:
        """Return the repository of a decoding method that moved to the Hub (a hook of transformers).

        Raises:
            ValueError: contrastive search, which would ask the user to trust code that then fails.
        """
        if generation_mode == GenerationMode.CONTRASTIVE_SEARCH and self._is_stateful:
            raise ValueError(
                "contrastive search takes back rejected candidates, but a recurrent state cannot be rolled back, got "
                "penalty_alpha and top_k; leave penalty_alpha out, or search with num_beams"
            )
        return super()._get_deprecated_gen_repo(generation_mode, *args, **kwargs)
