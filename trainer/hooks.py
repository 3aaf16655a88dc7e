"""The private interfaces of transformers' Trainer, accelerate and TRL that training overrides or reads."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.state import GradientState, PartialState
from transformers import Trainer, TrainingArguments

from ..modeling.releases import check_hooks

TRAINER_HOOKS = {
    "_get_grad_norm": ("model", "grad_norm"),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_init_training_state": (
        "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"
    ),
    "_issue_warnings_after_load": ("load_result",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_rng_state": ("checkpoint",),
    "_maybe_log_save_evaluate": ("tr_loss",),
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
    "_total_loss_scalar",
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


_PACKAGE = __name__.partition(".")[0]

check_hooks(Accelerator, {"_prepare_cp": ()}, ("_is_accelerate_prepared", "gradient_state", "parallelism_config"))
check_hooks(PartialState, {}, ("_shared_state",))
check_hooks(GradientState, {}, ("end_of_dataloader", "remainder"))
