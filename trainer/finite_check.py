"""The check that loss and gradient are finite, before they reach the parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .failures import TrainingFailure, explain


class FiniteCheck:
    """Stops a run at a loss or gradient that is not finite, unless `logging_nan_inf_filter` is set.

    The norm of the gradient is the same on all ranks, and not finite if any rank's gradient is not. So only a failing
    run has to communicate, to find the rank whose loss it was.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.active = trainer, not trainer.args.logging_nan_inf_filter
        self.losses: list[Tensor] = []  # of this process, since the last optimizer step
        self.targets: Tensor | int | None = None  # number of targets of the step, by which losses are divided

    def note(self, loss: Tensor, targets: Tensor | int | None) -> None:
        if self.active:
            self.losses.append(loss)
            self.targets = targets

    def check_norm(self, norm: Tensor | float | None) -> None:
        losses, self.losses = self.losses, []
        if not self.active or norm is None or torch.isfinite(torch.as_tensor(norm)).all():
            return
        self._check_targets(losses[0].device)
        broken = (~torch.isfinite(torch.stack(losses))).unsqueeze(0)  # [1, micro-batches]
        by_rank = self.trainer.accelerator.gather(broken)
        if by_rank.any():
            ranks = [f"rank {rank} in micro-batch {batch}" for rank, batch in by_rank.nonzero().tolist()]
            raise self._failure(f"the loss is not finite, first on {', '.join(ranks[:8])}")
        if self.trainer.accelerator.scaler is None:  # which skips steps whose scaled gradient overflows
            raise self._failure(f"the loss is finite, but the norm of its gradient is {float(norm)}")

    def _check_targets(self, device: torch.device) -> None:
        """Raise TrainingFailure if the step has no target: its mean loss is 0 / 0, whatever the learning rate."""
        own = torch.tensor([torch.inf if self.targets is None else float(torch.as_tensor(self.targets).max())])
        without = (self.trainer.accelerator.gather(own.to(device)) == 0).nonzero().flatten().tolist()
        if not without:
            return
        everywhere = len(without) == self.trainer.args.world_size
        ranks = "" if everywhere else f" of rank {', '.join(map(str, without))}"
        text = (
            f"the loss is a mean over targets, got none in this step's rows{ranks}: all labels are -100. Remove such "
            "rows from the data (their answers may be beyond sequence_length), or use more rows per step."
        )
        raise TrainingFailure(explain(self.trainer, text))

    def check_logged(self, loss: float) -> None:
        if self.active and not math.isfinite(loss):
            raise self._failure(f"the logged loss is {loss}")

    def _failure(self, what: str) -> TrainingFailure:
        text = (
            f"{what}. Check these rows, lower learning_rate or max_grad_norm, or warm up longer; "
            "logging_nan_inf_filter=True continues regardless."
        )
        return TrainingFailure(explain(self.trainer, text))
