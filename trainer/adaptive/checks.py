"""Checks of the arguments and of the profile of a run in adaptive groups."""

from __future__ import annotations

from typing import Any

from ...sequence_parallel.planner import Profile, aligned_groups


def check_profile(profile: Profile, name: str, processes: int) -> str:
    """Raise ValueError unless a profile was measured on this number of processes and knows all of their groups.

    Returns:
        how to measure a profile that fits, for messages.
    """
    again = f"measure again, on {processes}: linear-llama3 profile RECIPE.yaml FILE.json processes={processes}"
    if profile.origin == "measured" and profile.processes != processes:
        raise ValueError(
            f"a measured profile must be of the launch's number of processes, {processes}, got one of "
            f"{profile.processes} in {name}; {again}"
        )
    missing = sorted({degree for degree, _ in aligned_groups(processes)} - profile.links.keys())
    if missing:
        raise ValueError(
            f"a profile must have links of all groups that {processes} processes can form, got none of "
            f"{' and '.join(map(str, missing))} in {name}; {again}"
        )
    return again


def check_training(profile: Profile, args: Any, again: str, *, fsdp: bool) -> None:
    """Raise ValueError unless a profile was measured with the checkpointing and sharding of the run."""
    name = args.planner_profile
    recomputes = bool(args.gradient_checkpointing or getattr(args, "activation_checkpointing", False))
    if profile.gradient_checkpointing not in (None, recomputes):
        raise ValueError(
            f"a profile must be of training with gradient_checkpointing={recomputes}, as the run has it, got "
            f"{profile.gradient_checkpointing} in {name}; {again}"
        )
    if profile.bytes.sharded and not fsdp:
        raise ValueError(
            f"a profile whose states are sharded is of training with FSDP, got it in {name} for a run without; "
            f"switch fsdp on, or {again}"
        )


def check_arguments(args: Any) -> None:
    """Raise ValueError for arguments that adaptive groups cannot honor."""
    if args.planner_profile is None:
        raise ValueError(
            "adaptive groups need planner_profile (sequence_parallel.profile of a recipe): a profile's name or file, "
            "as `linear-llama3 profile` writes it; got None"
        )
    required = {
        "gradient_accumulation_steps": (1, "plans choose the number of micro-batches"),
        "label_smoothing_factor": (0, "the smoother would shift labels inside a part of a sequence"),
        "dataloader_num_workers": (0, "a thread reads and plans the next step"),
        "average_tokens_across_devices": (True, "ranks have unequal numbers of targets"),
        "auto_find_batch_size": (False, "a plan keeps to the profile's memory"),
    }
    for name, (value, why) in required.items():
        if getattr(args, name) != value:
            raise ValueError(f"{name} must be {value} with adaptive groups ({why}), got {getattr(args, name)}")
    if args.accelerator_config.dispatch_batches or args.accelerator_config.split_batches:
        raise ValueError("adaptive groups have their own loader; leave dispatch_batches and split_batches out")
