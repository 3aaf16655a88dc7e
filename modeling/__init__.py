"""Configuration, model, mixers, caches and Hub files."""

if __name__ != "linear_llama3.modeling":
    raise ImportError("import linear_llama3.modeling, not " + __name__)

from .cache import RecurrentCache
from .configuration import MIXERS, LinearLlama3Config, Mixer
from .heads import (
    LinearLlama3ForMaskedLM,
    LinearLlama3ForQuestionAnswering,
    LinearLlama3ForSequenceClassification,
    LinearLlama3ForTokenClassification,
)
from .layers import enable_sequence_tiling
from .mixers import LinearAttention
from .model import LinearLlama3ForCausalLM, LinearLlama3Model
from .prefill import prefill
from .pretrained import LinearLlama3PreTrainedModel

__all__ = [
    "MIXERS",
    "LinearAttention",
    "LinearLlama3Config",
    "LinearLlama3ForCausalLM",
    "LinearLlama3ForMaskedLM",
    "LinearLlama3ForQuestionAnswering",
    "LinearLlama3ForSequenceClassification",
    "LinearLlama3ForTokenClassification",
    "LinearLlama3Model",
    "LinearLlama3PreTrainedModel",
    "Mixer",
    "RecurrentCache",
    "enable_sequence_tiling",
    "prefill",
]
