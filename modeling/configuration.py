"""Configuration: Llama's fields, the layer types, and the table of mixers that `linear_attention_type` selects from."""

# No `from __future__ import annotations` here: @strict checks values against types, which must not be strings.

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils.type_validators import interval

from ..ops.decays import lightning_log_decay, retention_log_decay
from ..ops.feature_maps import FEATURE_MAPS
from .hub import AUTO_MAP, write_shim
from .llama import HUB_OPTIONS, llama_fields
from .presets import preset_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixer:
    """Properties that distinguish one kind of linear attention from another."""

    feature_map: str = "identity"
    key_head_dim: int | None = None  # channels of a head before the feature map; None: the config's head_dim
    constant_log_decay: Callable[[int, int, int], Tensor] | None = None  # (heads, layer, layers) -> [H_kv]
    learned_decay: bool = False  # per token, head and feature of the keys
    use_rope: bool = False
    normalize: bool = False  # divide by the sum of the weights; without it, an RMSNorm per head keeps the scale
    output_gate: str = "silu"  # activation of the gate on the output


def _retention_log_decay(num_heads: int, layer_idx: int, num_layers: int) -> Tensor:
    return retention_log_decay(num_heads)  # the same in every layer; a named function, so that models can be pickled


MIXERS: dict[str, Mixer] = {
    "basic": Mixer(feature_map="silu"),
    "lightning": Mixer(feature_map="silu", constant_log_decay=lightning_log_decay, output_gate="sigmoid"),
    "retention": Mixer(constant_log_decay=_retention_log_decay, use_rope=True),
    "gla": Mixer(learned_decay=True),
    # Rebased's weights (q . k)^2 may all be near 0 at the first tokens of a document. The quotient of sums over
    # expanded features is then accurate to about three digits in float32.
    "based": Mixer(feature_map="taylor", key_head_dim=16, normalize=True),
    "rebased": Mixer(feature_map="rebased", key_head_dim=16, normalize=True),
}
"""Value of `config.linear_attention_type` -> mixer."""

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
)
LAYER_TYPES = ("linear_attention", "full_attention")


@strict
class LinearLlama3Config(PreTrainedConfig):
    """Configuration of a Llama 3 model whose layers are linear attention, softmax attention, or a mixture.

    The defaults are the sizes of Llama 3 8B with softmax in every fourth layer: a model built from
    `LinearLlama3Config()` has 8.4 billion parameters, 34 GB in float32. To start from Llama's weights, use
    `from_llama`. Fields beyond Llama's:

    - `linear_attention_type`: the mixer of the linear layers, one of `MIXERS` ("basic", "lightning", ...).
    - `layer_types`: "linear_attention" or "full_attention" per layer; None follows `full_attention_interval`.
    - `full_attention_interval`: n makes the last of every n layers softmax (4: LLLN); 0 or None makes all
      linear.
    - `is_causal`: False lets every token see the complete sequence (masked-LM, classification); only mixers without
      a decay.
    - `linear_feature_map`: feature map of queries and keys, one of `FEATURE_MAPS`; None: the mixer's default.
    - `linear_use_rope`: rotary embedding in the linear layers; None: the mixer's default.
    - `linear_output_gate`: multiply the output by the mixer's gate (a projection of the layer's input).
    - `linear_output_norm`: RMSNorm of each head's output; None: for mixers that do not divide by the sum of weights.
    - `linear_num_key_value_heads`, `linear_key_head_dim`, `linear_value_head_dim`: key/value heads, D_k (before the
      feature map) and D_v of the linear layers; None: `num_key_value_heads` and `head_dim`, or the mixer's D_k.
      The number of query heads is Llama's.
    - `gate_bias_init`: initial bias of a learned decay; a large bias gives a long memory (6.0: a decay of about 0.9998
      per token).

    Raises:
        ValueError: a field has an unknown value, or fields contradict each other.
    """

    model_type = "linear_llama3"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  (a class attribute by transformers' rule)
    default_theta = 500000.0

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False

    is_causal: bool = True
    linear_attention_type: str = "basic"
    layer_types: list[str] | None = None
    full_attention_interval: int | None = 4
    linear_feature_map: str | None = None
    linear_use_rope: bool | None = None
    linear_output_gate: bool = True
    linear_output_norm: bool | None = None
    linear_num_key_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    gate_bias_init: float = 6.0

    def __post_init__(self, **kwargs: Any) -> None:
        for name in SIZES:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _check_choice("linear_attention_type", self.linear_attention_type, MIXERS)
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.linear_num_key_value_heads = self.linear_num_key_value_heads or self.num_key_value_heads
        self.linear_key_head_dim = self.linear_key_head_dim or self.mixer.key_head_dim or self.head_dim
        self.linear_value_head_dim = self.linear_value_head_dim or self.head_dim
        if self.layer_types is None:
            every = self.full_attention_interval or self.num_hidden_layers + 1
            self.layer_types = [LAYER_TYPES[layer % every == 0] for layer in range(1, self.num_hidden_layers + 1)]
        super().__post_init__(**kwargs)
        self.validate_architecture()  # once here, as ValueError: @strict wraps what its own call raises

    def validate_architecture(self) -> None:
        """Raise ValueError if fields contradict each other."""
        if self.linear_feature_map is not None:
            _check_choice("linear_feature_map", self.linear_feature_map, FEATURE_MAPS)
        if self.full_attention_interval is not None and self.full_attention_interval < 0:
            raise ValueError(
                f"full_attention_interval must be 0 or more, got {self.full_attention_interval}; "
                "0 makes every layer linear, 4 makes the last of every four softmax"
            )
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}; change one of them"
            )
        for name in ("num_key_value_heads", "linear_num_key_value_heads"):
            if self.num_attention_heads % getattr(self, name) != 0:
                raise ValueError(
                    f"num_attention_heads must be a multiple of {name}, got {self.num_attention_heads} and "
                    f"{getattr(self, name)}; each key/value head serves the same number of query heads"
                )
        layer_types = self.layer_types or []
        if len(layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must have one entry for each of num_hidden_layers={self.num_hidden_layers} "
                f"layers, got {len(layer_types)}; give layer_types=None to follow full_attention_interval"
            )
        for layer_type in layer_types:
            _check_choice("every entry of layer_types", layer_type, LAYER_TYPES)
        features = self.linear_state_shape[1]
        if self.uses_linear_rope and features != self.head_dim:
            raise ValueError(
                "linear layers with rotary embedding share the model's table, so the features of linear_key_head_dim "
                f"must be head_dim, got {features} features (of {self.linear_key_head_dim}) and {self.head_dim}; set "
                "linear_use_rope=False or make them equal"
            )
        if self.mixer.normalize and not FEATURE_MAPS[self.feature_map].non_negative:
            able = sorted(name for name, feature_map in FEATURE_MAPS.items() if feature_map.non_negative)
            raise ValueError(
                f"{self.linear_attention_type!r} divides by the sum of the weights, which must not be negative, got "
                f"linear_feature_map={self.linear_feature_map!r}; set it to one of {able}"
            )
        if not self.is_causal and self.linear_layers and (self.mixer.learned_decay or self.mixer.constant_log_decay):
            without = sorted(n for n, m in MIXERS.items() if not (m.learned_decay or m.constant_log_decay))
            raise ValueError(
                "is_causal=False needs a mixer without a decay, which has a direction, got "
                f"{self.linear_attention_type!r}; set linear_attention_type to one of {without}"
            )

    @property
    def has_softmax_layers(self) -> bool:
        """True if any layer is softmax attention."""
        return "full_attention" in (self.layer_types or ())

    @property
    def linear_layers(self) -> list[int]:
        """Indices of the linear layers."""
        return [index for index, name in enumerate(self.layer_types or ()) if name == "linear_attention"]

    @property
    def layer_pattern(self) -> str:
        """The layers as text, such as "4 x LLLN": L is a linear layer, N a softmax layer."""
        letters = "".join("N" if layer == "full_attention" else "L" for layer in self.layer_types or ())
        period = next(n for n in range(1, len(letters) + 1) if letters == letters[:n] * (len(letters) // n))
        return f"{len(letters) // period} x {letters[:period]}"

    @property
    def linear_sizes(self) -> tuple[int, int, int]:
        """(H_kv, D_k, D_v) of the linear layers."""
        sizes = self.linear_num_key_value_heads, self.linear_key_head_dim, self.linear_value_head_dim
        return sizes  # type: ignore[return-value]  # __post_init__ leaves no None

    @property
    def linear_state_shape(self) -> tuple[int, int, int]:
        """(H_kv, features of a key, columns) of a linear layer's state; the last column may be the normalizer."""
        heads, key_dim, value_dim = self.linear_sizes
        return heads, FEATURE_MAPS[self.feature_map].size(key_dim), value_dim + self.mixer.normalize

    @property
    def mixer(self) -> Mixer:
        """The mixer of the linear layers."""
        return MIXERS[self.linear_attention_type]

    @property
    def feature_map(self) -> str:
        """Name of the feature map of the linear layers."""
        return self.linear_feature_map or self.mixer.feature_map

    @property
    def uses_linear_output_norm(self) -> bool:
        """True if linear layers apply an RMSNorm to the output of each head."""
        return not self.mixer.normalize if self.linear_output_norm is None else self.linear_output_norm

    @property
    def uses_linear_rope(self) -> bool:
        """True if linear layers apply the rotary embedding to queries and keys."""
        return self.mixer.use_rope if self.linear_use_rope is None else self.linear_use_rope

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "LinearLlama3Config":
        """Return a configuration of the literature by name, without weights and without network access.

        A name consists of a shape of model_cards/*.json ("linear-llama3-1b", "linear-llama-3.2-1b", ...), a mixer and a
        share of softmax layers: "linear-llama3-1b-gla-hybrid-1-4", "linear-llama3-1b-retention-pure". Mixer and share
        may be left out; the shape's own are used. `from_pretrained` would read a name as one on the Hub.

        Args:
            name: shape[-mixer][-pure or -hybrid-1-n].
            overrides: fields of this config that replace the preset's: `num_hidden_layers=2`.

        Raises:
            ValueError: the name (the message lists all) or a field is unknown, or fields contradict each other.
        """
        cls._check_fields("from_preset", overrides)
        return cls(**preset_fields(name, MIXERS, overrides))

    @classmethod
    def from_llama(cls, llama: LlamaConfig | str | os.PathLike, **changes: Any) -> "LinearLlama3Config":
        """Return the configuration of a Llama model with linear attention in its layers.

        All values of the Llama config are kept unless `changes` names them; other fields have this class's defaults.

            config = LinearLlama3Config.from_llama("meta-llama/Llama-3.2-1B", linear_attention_type="gla")
            model = LinearLlama3ForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B", config=config)

        Args:
            llama: a LlamaConfig, or a folder or Hub name.
            changes: fields of this config: `linear_attention_type="gla"`, `full_attention_interval=1` (all layers
                softmax: the same model), `rope_parameters={...}` (another rotary embedding than the weights were
                trained with); also `revision`, `token`, ... for a Hub name.

        Raises:
            ValueError: the config is of another architecture, a field is unknown, or fields contradict each other.
        """
        hub = {name: changes.pop(name) for name in HUB_OPTIONS if name in changes}
        cls._check_fields("from_llama", changes)
        name, fields = llama_fields(llama, **hub)
        config = cls(**{**fields, **changes})
        config.name_or_path = name
        return config

    @classmethod
    def _check_fields(cls, method: str, names: Iterable[str]) -> None:
        for name in names:
            attribute = getattr(cls, name, cls)  # derived values are properties without a setter
            if callable(attribute) or (isinstance(attribute, property) and attribute.fset is None):
                raise ValueError(f"{method} takes the fields of {cls.__name__}, got {name!r}; see its documentation")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Like `PreTrainedConfig.from_pretrained`; the config remembers its checkpoint as `name_or_path`."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).name_or_path = pretrained_model_name_or_path
        return loaded

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like `PreTrainedConfig.from_dict`; changes are checked, and `full_attention_interval` moves softmax layers.

        Raises:
            ValueError: another model's dictionary, or changes that do not fit the rest.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"the checkpoint's model_type must be {cls.model_type!r}, got {model_type!r}; load it with its own "
                "class or AutoModelForCausalLM or, to start from Llama weights, write "
                "LinearLlama3ForCausalLM.from_pretrained(name, config=LinearLlama3Config.from_llama(name, "
                'linear_attention_type="gla")). LinearLlama3Config() alone describes a model of 8.4 billion parameters'
            )
        changes = {name: kwargs.pop(name) for name in LinearLlama3Config.__annotations__ if name in kwargs}
        if "full_attention_interval" in changes:
            changes.setdefault("layer_types", None)
        return super().from_dict(config_dict | changes, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Like `PreTrainedConfig.save_pretrained`; also write the shim that imports the package (hub.py)."""
        self.auto_map = dict(AUTO_MAP)
        write_shim(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: checkpoints name the installed package (hub.py); no source file is copied.

        transformers calls this on every class that it loads through `auto_map`. Its own version would make the next
        save copy this file next to the weights and remove the reference to the package.
        """


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {sorted(choices)}, got {value!r}; choose one of these")
