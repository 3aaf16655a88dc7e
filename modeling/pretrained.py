"""The base class of all models: initialization, loading, saving, and the features that transformers may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .attention import LinearLlama3Attention
from .configuration import LinearLlama3Config
from .decoder_layer import LinearLlama3DecoderLayer
from .hub import staged_save
from .inputs import check_distribution
from .llama import HUB_OPTIONS, check_config
from .mixers import LearnedFeatureMap, LinearAttention
from .model_card import add_card, provenance


class LinearLlama3PreTrainedModel(PreTrainedModel):
    """Base class of the model and of its heads."""

    config: LinearLlama3Config
    config_class = LinearLlama3Config  # transformers reads the annotation, but here it is a string
    base_model_prefix = "model"
    model_tags = ["linear_llama3"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    provenance: dict[str, Any] | None = None  # set by `from_pretrained`; see model_card.provenance
    _no_split_modules = ["LinearLlama3DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = False  # True promises a tensor-parallel plan, on which serving engines rely
    _keep_in_fp32_modules_strict = list(LinearAttention.exact_parameters)  # noqa: RUF012
    _can_compile_fullgraph = True  # with a static or a RecurrentCache
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LinearLlama3DecoderLayer,
        "attentions": LinearLlama3Attention,
    }

    def __init__(self, config: LinearLlama3Config, *args: Any, **kwargs: Any) -> None:
        _check_class(config)
        super().__init__(config, *args, **kwargs)

    @property
    def _is_stateful(self) -> bool:
        """True if there is a recurrent state. It cannot be rolled back, so transformers refuses assisted decoding."""
        return bool(self.config.linear_layers)

    @property
    def supports_context_parallel(self) -> bool:
        """True only while our own sequence parallelism is on, so that others keep refusing the model."""
        return self.base_model.sequence_parallel_context is not None

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing, for the reason given at `LinearLlama3Config.register_for_auto_class`."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LinearAttention):
            if module.mixer.constant_log_decay is not None:
                init.copy_(module.log_decay, module.constant_log_decay())
            if module.mixer.learned_decay:
                init.constant_(module.decay_bias, self.config.gate_bias_init)
        elif isinstance(module, LearnedFeatureMap):
            for name, value in module.initial_values().items():
                init.copy_(getattr(module, name), value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """Like `PreTrainedModel.from_pretrained`, for checkpoints of this package and, with a config, of Llama.

            config = LinearLlama3Config.from_llama("meta-llama/Llama-3.2-1B", linear_attention_type="gla")
            model = LinearLlama3ForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B", config=config)

        The checkpoint's license is remembered for the next model card.

        Raises:
            ValueError: `config` is of another class or contradicts the checkpoint's config (a config that was read from
                this checkpoint may be changed), a Llama checkpoint is loaded without `config`, or tensor or pipeline
                parallelism is requested.
        """
        check_distribution(kwargs)
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        if (config := kwargs.get("config")) is not None:
            if isinstance(config, str | os.PathLike):
                config = kwargs["config"] = LinearLlama3Config.from_pretrained(config, **hub)
            _check_class(config)
            if pretrained_model_name_or_path is not None:
                check_config(config, str(pretrained_model_name_or_path), **hub)
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
        """Like `PreTrainedModel.save_pretrained`; an interrupted save leaves the previous checkpoint intact.

        All files are written to a staging folder and moved when they are complete. With `push_to_hub=True`
        the upload comes before the move. The files include a model card, unless the folder has the user's own.
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
            if not self._hf_peft_config_loaded:  # adapters alone are not a model
                add_card(self, staging, folder.resolve().name)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Add our card to every upload (a hook of transformers, which has just added a placeholder card)."""
        if not self._hf_peft_config_loaded:
            add_card(self, Path(working_dir), repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def _check_class(config: Any) -> None:
    if not isinstance(config, LinearLlama3Config):
        raise ValueError(
            f"config must be a LinearLlama3Config, got a {type(config).__name__}; convert a Llama config with "
            'LinearLlama3Config.from_llama(config, linear_attention_type="gla")'
        )
