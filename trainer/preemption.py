"""SIGTERM, which schedulers send before they take a machine away: save at the end of the step, then leave.

transformers' `enable_jit_checkpoint` lets every process stop at the step in which its own signal arrived; those that
are a step further then wait for ever. Here all processes agree on the step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl

EXIT_CODE = 128 + signal.SIGTERM  # a shell's, for what a signal ended; the launch counts as failed and can be repeated


class SaveOnSigterm(TrainerCallback):
    """Asks for a save and a stop at the end of the first step that any process's signal has reached."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = self.agreed = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM is noted instead of ending the process; only in a main thread, others have no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received = self.agreed = False
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _note(self, *signal_and_frame: Any) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        received = torch.tensor(float(self.received), device=self.accelerator.device)
        self.agreed = self.accelerator.reduce(received, "sum").item() > 0
        if self.agreed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may not be the time


def ignore_sigterm(init: Callable[[int], None] | None, worker: int) -> None:
    """What a loader worker begins with, before `init`: launchers signal whole process groups, and a step that has lost
    its workers does not end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if init is not None:
        init(worker)
