"""transformers' TrainingArguments with the choices of sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..sequence_parallel import SequenceParallelConfig


@dataclass
class LinearLlama3TrainingArguments(TrainingArguments):
    """Fields beyond TrainingArguments'. accelerate's own `cp` setting goes before `sequence_parallel_size`."""

    sequence_parallel_size: int | str = field(
        default="auto",
        metadata={
            "help": "Processes that share every sequence; 'auto' takes all processes of the launch, 'adaptive' plans "
            "groups for every step."
        },
    )
    planner_profile: str | None = field(
        default=None, metadata={"help": "Of 'adaptive': a profile's name or JSON file, by which groups are planned."}
    )
    linear_strategy: str = field(
        default="lasp2",
        metadata={"help": "How linear layers exchange states: lasp1, lasp2, all_scan, all_to_all, auto."},
    )
    softmax_strategy: str = field(
        default="lasp2h", metadata={"help": "How softmax layers meet: lasp2h, ring, token_ring, rsa, ulysses, auto."}
    )
    sequence_layout: str = field(
        default="auto", metadata={"help": "Which tokens a rank holds: contiguous, zigzag, auto."}
    )
    chunked_loss: bool = field(
        default=True,
        metadata={
            "help": "The language models' loss without the logits of all tokens. They are computed where something "
            "reads them: compute_metrics, compute_loss_func, label smoothing."
        },
    )
    sequence_tiling: bool = field(
        default=False,
        metadata={"help": "Norms, MLPs and output projections in tiles of the sequence, computed once more backward."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter takes part, also on a rank without labels."}
    )
    include_num_input_tokens_seen: str | bool = field(
        default="all", metadata={"help": "Count tokens, and log tokens a second."}
    )

    resume_from_checkpoint: str | bool | None = field(
        default=None,
        metadata={
            "help": "True takes the newest whole checkpoint of output_dir; 'latest' as well, or starts anew where "
            "there is none; else a folder."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Recipes only: allow the run to replace the model and the checkpoints in output_dir. Without it a "
            "folder that holds another run is refused. The Trainer classes do not read this field."
        },
    )
    enable_jit_checkpoint: bool = field(
        default=True, metadata={"help": "SIGTERM ends the run after its step, saved (unless save_strategy is 'no')."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Go on with a loss that is not finite; False stops the run."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel must be False (Liger has no kernels for this model and would leave it as it is), got "
                "True; leave it out, linear layers have Triton kernels of their own"
            )


def sequence_parallel_config(args: TrainingArguments) -> SequenceParallelConfig:
    """The strategies that `args` names; the defaults for plain TrainingArguments (TRL's, for instance)."""
    default = SequenceParallelConfig()
    return SequenceParallelConfig(
        linear=getattr(args, "linear_strategy", default.linear),
        softmax=getattr(args, "softmax_strategy", default.softmax),
        layout=getattr(args, "sequence_layout", default.layout),
    )
