"""Gathering and learning-rate schedules if several processes, the ranks of a sequence, hold the same rows."""

from __future__ import annotations

import math
from typing import Any

from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import gather_object, recursively_apply
from torch import Tensor


def gather_rows(accelerator: Accelerator, ranks: int, input_data: Any, use_gather_object: bool = False) -> Any:
    """Gather like accelerate's `gather_for_metrics`, but return every row of the dataset once.

    accelerate's own keeps a copy of every row for each rank of a sequence, or cuts rows off at the end of the data
    because of the copies.

    Args:
        ranks: number of adjacent ranks that share a sequence.
        input_data: nested tensors `[rows, ...]`, the same on all ranks of a sequence, or a list with one object per
            row. A tensor without dimensions belongs to the process; those of all processes are returned.
        use_gather_object: gather nested tensors as objects, too.

    Raises:
        ValueError: the ranks of a sequence have different rows.
    """
    state = accelerator.gradient_state

    def without_repeats(rows: Any) -> Any:
        """Drop the rows that accelerate's loader has repeated at the end to fill the last batch."""
        return rows[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else rows

    def once(x: Tensor) -> Tensor:
        gathered = accelerator.gather(x)
        if not x.dim():
            return gathered
        replicas = gathered.unflatten(0, (-1, ranks, x.shape[0]))  # [replicas, ranks, rows, ...]
        first = replicas[:, :1]
        if not bool(((replicas == first) | ((replicas != replicas) & (first != first))).all()):  # nan equals nan
            raise ValueError(
                "gather_for_metrics takes rows that all ranks of a sequence agree on, got different ones (logits or "
                "losses of a part of the sequence?); gather complete sequences with sequence_parallel.unshard or, "
                'for a loss, use accelerator.reduce(x, "mean")'
            )
        return without_repeats(first.flatten(0, 2))

    if use_gather_object or not _all_tensors(input_data):
        return without_repeats([row for part in gather_object([input_data])[::ranks] for row in part])
    return recursively_apply(once, input_data)


def _all_tensors(data: Any) -> bool:
    try:
        recursively_apply(lambda x: x, data, error_on_other_type=True)
    except TypeError:
        return False
    return True


class ReplicaScheduler(AcceleratedScheduler):
    """Scheduler that advances once per replica. accelerate's own assumes a different batch on every process."""

    def __init__(self, prepared: AcceleratedScheduler, replicas: int) -> None:
        super().__init__(
            prepared.scheduler,
            prepared.optimizers,
            step_with_optimizer=prepared.step_with_optimizer,
            split_batches=True,  # so that accelerate's own step advances by one
        )
        self.replicas = replicas

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Like accelerate's, but advance once for each batch of the step."""
        updates = self.step_with_optimizer and self.gradient_state.sync_gradients
        for _ in range(self.replicas if updates else 1):
            if self.scheduler._step_count <= getattr(self.scheduler, "total_steps", math.inf):  # OneCycle's end
                super().step(*args, **kwargs)
