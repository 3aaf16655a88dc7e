"""Training: transformers' Trainer with sequence parallelism, recipes, and what is left beside the weights."""

if __name__ != "linear_llama3.trainer":
    raise ImportError("import linear_llama3.trainer, not " + __name__)

from ..modeling.releases import warn_untested
from .accelerator import SequenceParallelAccelerator
from .arguments import LinearLlama3TrainingArguments
from .trainer import LinearLlama3Trainer, SequenceParallelMixin

warn_untested("accelerate", "datasets", "peft", "trl")

__all__ = [
    "LinearLlama3Trainer",
    "LinearLlama3TrainingArguments",
    "SequenceParallelAccelerator",
    "SequenceParallelMixin",
]
