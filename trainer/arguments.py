"""transformers' TrainingArguments with fields for sequence parallelism and reliability."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from ..sequence_parallel import SequenceParallelConfig

ADAPTIVE = "adaptive"  # value of sequence_parallel_size


@dataclass
class LinearLlama3TrainingArguments(TrainingArguments):
    """TrainingArguments with further fields. accelerate's own `cp` setting overrides `sequence_parallel_size`."""

    sequence_parallel_size: int | str = HfArg(
        default="auto",
        help="Processes that share every sequence; 'auto' takes all processes of the launch, 'adaptive' plans groups "
        "for every step.",
    )
    planner_profile: str | None = HfArg(
        default=None,
        help="With 'adaptive': name or JSON file of the profile by which groups are planned.",
    )
    linear_strategy: str = HfArg(
        default="lasp2",
        help="How linear layers exchange states: lasp1, lasp2, all_scan, all_to_all, auto.",
    )
    softmax_strategy: str = HfArg(
        default="lasp2h",
        help="How softmax layers exchange keys and values: lasp2h, ring, token_ring, rsa, ulysses, auto.",
    )
    sequence_layout: str = HfArg(default="auto", help="Tokens that a rank holds: contiguous, zigzag, auto.")
    chunked_loss: bool = HfArg(
        default=True,
        help="Compute the loss of language models without the logits of all tokens, unless something reads them: "
        "compute_metrics, compute_loss_func, label smoothing.",
    )
    sequence_tiling: bool = HfArg(
        default=False,
        help="Compute norms, MLPs and output projections in tiles of the sequence, and again in backward.",
    )
    ddp_find_unused_parameters: bool | None = HfArg(
        default=False,
        help="False: every parameter has a gradient, also on a rank without labels.",
    )
    include_num_input_tokens_seen: str | bool = HfArg(default="all", help="Count tokens, and log tokens per second.")
    resume_from_checkpoint: str | bool | None = HfArg(
        default=None,
        help="True: the newest complete checkpoint of output_dir. 'latest': the same, or a new run if there is none. "
        "Or a checkpoint's folder.",
    )
    overwrite_output_dir: bool = HfArg(
        default=False,
        help="Recipes only: allow the run to replace the model and the checkpoints in output_dir. Without it a "
        "folder that holds another run is refused. The Trainer classes do not read this field.",
    )
    enable_jit_checkpoint: bool = HfArg(
        default=True,
        help="On SIGTERM save at the end of the step and exit (unless save_strategy is 'no').",
    )
    logging_nan_inf_filter: bool = HfArg(
        default=False,
        help="Continue with a loss that is not finite; False stops the run.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel must be False (Liger has no kernels for this model and would not change it), got "
                "True; remove it, linear layers have their own Triton kernels"
            )


def sequence_parallel_config(args: TrainingArguments) -> SequenceParallelConfig:
    """Return the strategies that `args` names, or the defaults for other TrainingArguments (TRL's, for instance)."""
    default = SequenceParallelConfig()
    return SequenceParallelConfig(
        linear=getattr(args, "linear_strategy", default.linear),
        softmax=getattr(args, "softmax_strategy", default.softmax),
        layout=getattr(args, "sequence_layout", default.layout),
    )
