"""SIGTERM, which schedulers send before they stop a job: save at the end of the step, then exit.

transformers' `enable_jit_checkpoint` lets every process stop at the step in which its own signal arrived; processes
that are a step further then wait forever. Here all processes agree on the step.
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
from transformers.utils import logging

from .manifest import LATEST

logger = logging.get_logger(__name__)

EXIT_CODE = 128 + signal.SIGTERM  # as in a shell for a process that a signal ended: the launch counts as failed


class SaveOnSigterm(TrainerCallback):
    """Saves and stops at the end of the first step after any process has received SIGTERM.

    It must be the last callback, since it ends the process after the save.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = self.agreed = False
        self.over = RawValue("b", 1)  # shared with the loader's workers: 1 if they may exit

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Record SIGTERM instead of ending the process. Only a main thread can; others receive no signals."""
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._record) if main else None
        self.received, self.agreed, self.over.value = False, False, 0
        try:
            yield
        finally:
            self.over.value = 1
            if main:
                signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _record(self, *signal_and_frame: Any) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        received = torch.tensor(float(self.received), device=self.accelerator.device)
        self.agreed = self.accelerator.reduce(received, "sum").item() > 0
        if self.agreed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may be no time for it

    def on_save(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if not self.agreed:
            return
        if args.process_index == 0:
            logger.warning(
                f"SIGTERM: step {state.global_step} is saved in {args.output_dir}; "
                f'resume_from_checkpoint="{LATEST}" continues from it'
            )
        raise SystemExit(EXIT_CODE)


def outlive_sigterm(init: Callable[[int], None] | None, over: Any, worker: int) -> None:
    """Start a loader worker that ignores SIGTERM until `over`, then call `init`.

    torchrun signals workers, too, and a step that has lost its workers does not end. Python itself ends workers by
    SIGTERM at exit, after `over`.
    """
    signal.signal(signal.SIGTERM, lambda *signal_and_frame: os._exit(EXIT_CODE) if over.value else None)
    if init is not None:
        init(worker)
