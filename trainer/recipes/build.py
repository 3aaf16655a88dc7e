"""Build tokenizer, model and adapters from a recipe."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from ...modeling import LinearLlama3Config, LinearLlama3ForCausalLM, loading
from .recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, with the chat template of `data.chat_template` if there is one."""
    tokenizer = loading.load_tokenizer(recipe.tokenizer)
    if (template := recipe.data.chat_template) is not None:
        if not Path(template).is_file():
            raise ValueError(f"data.chat_template must be a file with a Jinja template, got {template!r}: no such file")
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8-sig")
    return tokenizer


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, weights: bool = True
) -> LinearLlama3ForCausalLM | PeftModel:
    """Build the recipe's model, loaded or new, with adapters if the recipe has a section `lora`.

    Args:
        weights: False loads no weights (for shapes on the meta device).
    """
    config = build_config(recipe, tokenizer)
    if (name := recipe.model.get("name_or_path")) is None:
        model = LinearLlama3ForCausalLM._from_config(config)
    else:
        # the optimizer's steps are below the resolution of bfloat16; frozen weights stay as they are
        dtype = recipe.model.get("dtype", "float32" if recipe.lora is None else "auto")
        if weights:
            _report_on_one_process()
            try:
                model = LinearLlama3ForCausalLM.from_pretrained(name, config=config, dtype=dtype)
            except OSError as error:
                raise ValueError(_no_model(name, error)) from error
        else:
            model = LinearLlama3ForCausalLM._from_config(
                config, dtype=config.dtype if dtype == "auto" else getattr(torch, dtype)
            )
    if recipe.lora is None:
        return model
    adapters = recipe.lora_config()
    from peft import get_peft_model  # slow to import, and optional

    with warnings.catch_warnings():  # PEFT uses transformers' old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, adapters)


def _report_on_one_process() -> None:
    """Leave progress bars and reports of loading to rank 0; all processes load the same weights."""
    if int(os.environ.get("RANK", "0")) > 0:
        transformers.logging.disable_progress_bar()
        logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)


def build_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LinearLlama3Config:
    """Build the model's config from the recipe and, for a new model, the tokenizer's vocabulary."""
    if (name := recipe.model.get("name_or_path")) is not None:
        changes = {key: value for key, value in recipe.model.items() if key == "rope_parameters"}
        try:
            config = LinearLlama3Config.from_pretrained(name, **changes)
        except OSError as error:
            raise ValueError(_no_model(name, error)) from error
        config.max_position_embeddings = max(config.max_position_embeddings, recipe.sequence_length)
    else:
        special = {token: getattr(tokenizer, token) for token in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = recipe.model_config(vocab_size=len(tokenizer), **special)
    loading.check_vocabulary(tokenizer, config)
    return config


def _no_model(name: str, error: OSError) -> str:
    return f"name_or_path must be a folder or a Hub name with weights, got {name!r}: {loading.first_line(error)}"
