"""Start from Llama weights: read a Llama config, and refuse a config that contradicts its checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments of `from_pretrained` that locate a file in a repository."""

FILE_FIELDS = ("architectures", "auto_map", "model_type", "pretraining_tp", "transformers_version", "_name_or_path")
"""Entries of a Llama config that describe the file and its class, not the model."""

LLAMA_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "tie_word_embeddings", "rope_parameters",
)  # fmt: skip
"""Fields that must equal those of the checkpoint; otherwise its weights belong to a different model."""

LINEAR_FIELDS = {
    "is_causal": "is_causal",
    "layer_types": "layer_types",
    "linear_attention_type": "linear_attention_type",
    "linear_feature_map": "feature_map",
    "linear_use_rope": "uses_linear_rope",
    "linear_output_gate": "linear_output_gate",
    "linear_output_norm": "uses_linear_output_norm",
    "linear_num_key_value_heads": "linear_num_key_value_heads",
    "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim",
}
"""Further such fields of a linear Llama: field -> attribute with its value, in which None is resolved."""


def llama_fields(llama: LlamaConfig | str | os.PathLike, **hub: Any) -> tuple[str, dict[str, Any]]:
    """Return the name of the checkpoint ("" if unknown) and the fields of a Llama config that describe the model.

    The config may be given by a folder or Hub name, with `HUB_OPTIONS`. One of another architecture is a ValueError.
    """
    if isinstance(llama, PreTrainedConfig):
        name, fields = llama.name_or_path or "", llama.to_dict()
    else:
        name = str(llama)
        fields, _ = PreTrainedConfig.get_config_dict(name, **hub)
    if fields.get("model_type") != "llama":
        raise ValueError(
            f"from_llama needs the config of a Llama model (model_type 'llama'), got {fields.get('model_type')!r}"
            f"{f' in {name!r}' if name else ''}; weights of other architectures do not fit"
        )
    fields = LlamaConfig.from_dict(fields).to_dict()
    return name, {key: value for key, value in fields.items() if key not in FILE_FIELDS}


def check_config(config: PreTrainedConfig, name: str, **hub: Any) -> None:
    """Raise ValueError unless a config written by hand describes the model in a checkpoint, a folder or Hub name.

    A config that was read from this checkpoint, as its `name_or_path` shows, is not checked: every difference is a
    deliberate change.
    """
    if config.name_or_path and _same(config.name_or_path, name):
        return
    try:
        saved, _ = PreTrainedConfig.get_config_dict(name, **hub)
    except OSError:
        return  # weights without a config contradict nothing
    model_type = saved.get("model_type")
    if model_type == "llama":
        theirs, compared = LlamaConfig.from_dict(saved), {field: field for field in LLAMA_FIELDS}
        remedy = f"config=LinearLlama3Config.from_llama({name!r}"
    elif model_type == config.model_type:
        theirs, compared = type(config).from_dict(saved), {field: field for field in LLAMA_FIELDS} | LINEAR_FIELDS
        remedy = f"config=LinearLlama3Config.from_pretrained({name!r}"
    else:
        raise ValueError(
            f"weights must be those of a Llama or a linear Llama model, got model_type {model_type!r} in {name!r}; "
            "weights of other architectures do not fit"
        )
    values = {field: (getattr(config, key), getattr(theirs, key)) for field, key in compared.items()}
    wrong = {field: pair for field, pair in values.items() if pair[0] != pair[1]}
    if wrong:
        pairs = "; ".join(f"{field}={ours!r}, the checkpoint {saved!r}" for field, (ours, saved) in wrong.items())
        raise ValueError(
            f"the config contradicts the one saved with the weights in {name!r}: it has {pairs}. Start from the saved "
            f"one with {remedy}, ...), and pass only the fields that should differ, such as {next(iter(wrong))}=..."
        )


def _same(one: str, other: str) -> bool:
    """Return whether two names refer to the same folder or repository."""
    return one == other or (os.path.isdir(one) and os.path.isdir(other) and Path(one).samefile(other))
