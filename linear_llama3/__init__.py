"""Llama-3-class models with linear attention, trained on sequences that do not fit one device.

Importing the package registers its config and models with transformers' Auto classes.
"""

import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from . import modeling
from .modeling import (
    LinearLlama3Config,
    LinearLlama3ForCausalLM,
    LinearLlama3ForMaskedLM,
    LinearLlama3ForQuestionAnswering,
    LinearLlama3ForSequenceClassification,
    LinearLlama3ForTokenClassification,
    LinearLlama3Model,
    LinearLlama3PreTrainedModel,
)
from .modeling.hub import AUTO_CLASSES

__version__ = "0.1.0"

AutoConfig.register(LinearLlama3Config.model_type, LinearLlama3Config, exist_ok=True)
for _auto_class, _name in AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(LinearLlama3Config, getattr(modeling, _name), exist_ok=True)
# Trainer's label smoothing shifts the labels of the classes named here, and register() does not add ours
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(
    LinearLlama3Config.model_type, LinearLlama3ForCausalLM.__name__
)

__all__ = [
    "LinearLlama3Config",
    "LinearLlama3ForCausalLM",
    "LinearLlama3ForMaskedLM",
    "LinearLlama3ForQuestionAnswering",
    "LinearLlama3ForSequenceClassification",
    "LinearLlama3ForTokenClassification",
    "LinearLlama3Model",
    "LinearLlama3PreTrainedModel",
    "__version__",
]
