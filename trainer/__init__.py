"""Training: transformers' Trainer and Accelerator with sequence parallelism, recipes, checkpoints and reports."""

if __name__ != "linear_llama3.trainer":
    raise ImportError("import linear_llama3.trainer, not " + __name__)

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..modeling.releases import warn_untested

if TYPE_CHECKING:
    from .accelerator import SequenceParallelAccelerator
    from .arguments import LinearLlama3TrainingArguments
    from .checkpoints.reliability import ReliabilityMixin
    from .sharding import SequenceParallelMixin
    from .trainer import LinearLlama3Trainer

warn_untested("accelerate", "datasets", "peft", "trl")

__all__ = [
    "LinearLlama3Trainer",
    "LinearLlama3TrainingArguments",
    "ReliabilityMixin",
    "SequenceParallelAccelerator",
    "SequenceParallelMixin",
]
_MODULES = dict(
    zip(__all__, ("trainer", "arguments", "checkpoints.reliability", "accelerator", "sharding"), strict=True)
)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, since the command line's help needs none of them."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
