"""Config, model, mixers and Hub files."""

if __name__ != "linear_llama3.modeling":
    raise ImportError("import linear_llama3.modeling, not " + __name__)

from .cache import CountingCache
from .configuration import LinearLlama3Config
from .heads import (
    LinearLlama3ForMaskedLM,
    LinearLlama3ForQuestionAnswering,
    LinearLlama3ForSequenceClassification,
    LinearLlama3ForTokenClassification,
)
from .mixers import MIXERS, LinearAttention, Mixer
from .model import LinearLlama3ForCausalLM, LinearLlama3Model
from .prefill import prefill
from .pretrained import LinearLlama3PreTrainedModel
from .tiling import enable_sequence_tiling

__all__ = [
    "MIXERS",
    "CountingCache",
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
    "enable_sequence_tiling",
    "prefill",
]
