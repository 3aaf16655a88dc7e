"""SIGTERM, which schedulers send before they take a machine away: save at the end of the step, then leave.

transformers' `enable_jit_checkpoint` lets every process stop at the step in which its own signal arrived; those that
are a step further then wait for ever. Here all processes agree on the step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import RawValue
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
        self.over = RawValue("b", 1)  # shared with the loader's workers: whether they may go

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM is noted instead of ending the process; only in a main thread, others have no signals."""
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._note) if main else None
        self.received, self.agreed, self.over.value = False, False, 0
        try:
            yield
        finally:
            self.over.value = 1
            if main:
                signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _note(self, *signal_and_frame: Any) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        received = torch.tensor(float(self.received), device=self.accelerator.device)
        self.agreed = self.accelerator.reduce(received, "sum").item() > 0
        if self.agreed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may not be the time


def outlive_sigterm(init: Callable[[int], None] | None, over: Any, worker: int) -> None:
    """What a loader worker begins with, before `init`: torchrun signals it too, and a step that has lost its workers
    does not end. Python itself ends workers by SIGTERM at exit, after `over`."""
    signal.signal(signal.SIGTERM, lambda *signal_and_frame: os._exit(EXIT_CODE) if over.value else None)
    if init is not None:
        init(worker)
