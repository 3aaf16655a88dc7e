"""Hooks of transformers, accelerate and TRL: checks of what training relies on, and of what users override in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.state import GradientState, PartialState
from transformers import Trainer, TrainingArguments

from ..modeling.releases import check_hooks

TRAINER_HOOKS = {
    "_build_accelerator_args": (),
    "_get_grad_norm": ("model", "grad_norm"),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_init_training_state": (
        "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"
    ),
    "_issue_warnings_after_load": ("load_result",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_rng_state": ("checkpoint",),
    "_prepare_context_parallel_inputs": ("model", "inputs"),
    "_prepare_inputs": ("inputs",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save_checkpoint": ("model", "trial"),
    "_track_num_input_tokens": ("inputs",),
    "call_model_init": ("trial",),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "create_accelerator_and_postprocess": (),
    "create_model_card": (),
    "evaluation_loop": (
        "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"
    ),
    "floating_point_ops": ("inputs",),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "get_train_dataloader": (),
    "log": ("logs", "start_time"),
    "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
    "train": ("resume_from_checkpoint",),
    "training_step": ("model", "inputs"),
}  # fmt: skip
TRAINER_ATTRIBUTES = (
    "_globalstep_last_logged",
    "_tr_loss",
    "gather_function",
    "label_smoother",
    "neftune_noise_alpha",
    "num_input_tokens_seen",
    "processing_class",
)


def check_trainer(trainer: type) -> None:
    """Check the interfaces of the Trainer class that ours extends (transformers' or TRL's) and of TrainingArguments.

    Raises:
        ImportError: a release changed something that training relies on.
    """
    ours = [c.__module__.startswith(f"{_PACKAGE}.") for c in trainer.__mro__]
    check_hooks(trainer.__mro__[len(ours) - ours[::-1].index(True)], TRAINER_HOOKS)
    check_hooks(Trainer, TRAINER_HOOKS, TRAINER_ATTRIBUTES)
    check_hooks(TrainingArguments, {}, ("accelerator_config", "enable_jit_checkpoint", "fsdp_plugin_args"))


READ_SHARDS = ("compute_loss", "_prepare_inputs")  # Trainer's methods that receive one rank's part of a batch
RIGHT_FOR_SHARDS = (__package__, "transformers.trainer", "trl.trainer.sft_trainer")  # modules whose methods handle it


def check_overrides(trainer: type) -> None:
    """Raise ValueError if a class overrides a method that receives a part of a batch, without setting `handles_shards`.

    In a part, logits end at the cut, labels lack their neighbors, and the mean over a part is not the mean.
    """
    for owner in trainer.__mro__:
        methods = [name for name in READ_SHARDS if name in vars(owner)]
        known = any(owner.__module__ == name or owner.__module__.startswith(f"{name}.") for name in RIGHT_FOR_SHARDS)
        if methods and not known and not vars(owner).get("handles_shards", False):
            raise ValueError(
                f"under sequence parallelism {' and '.join(methods)} must know that a rank holds a part of every "
                f"sequence, got {owner.__name__}'s own; set model.loss_function instead (called with shift_labels and "
                "num_items_in_batch; needs chunked_loss=False), or set handles_shards = True in that class if it is "
                "correct for a part, for example if it returns what super() returns, or train with "
                "sequence_parallel_size=1"
            )


@contextlib.contextmanager
def temporarily(owner: Any, **values: Any) -> Iterator[None]:
    """Give attributes of `owner` other values while a hook runs."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


_PACKAGE = __name__.partition(".")[0]

check_hooks(
    Accelerator,
    {"_prepare_cp": (), "gather_for_metrics": ("input_data", "use_gather_object")},
    ("_is_accelerate_prepared", "gradient_state", "parallelism_config"),
)
check_hooks(PartialState, {}, ("_shared_state",))
check_hooks(GradientState, {}, ("end_of_dataloader", "remainder"))
