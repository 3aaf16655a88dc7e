"""Llama-3-class models with linear attention, trained on sequences that do not fit one device.

Importing the package registers its config and models with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

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

__version__ = "0.1.0"

AutoConfig.register(LinearLlama3Config.model_type, LinearLlama3Config, exist_ok=True)
AutoModel.register(LinearLlama3Config, LinearLlama3Model, exist_ok=True)
AutoModelForCausalLM.register(LinearLlama3Config, LinearLlama3ForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(LinearLlama3Config, LinearLlama3ForMaskedLM, exist_ok=True)
AutoModelForQuestionAnswering.register(LinearLlama3Config, LinearLlama3ForQuestionAnswering, exist_ok=True)
AutoModelForSequenceClassification.register(LinearLlama3Config, LinearLlama3ForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(LinearLlama3Config, LinearLlama3ForTokenClassification, exist_ok=True)
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
