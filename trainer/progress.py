"""Progress of a run: throughput for log entries (and so for every tracker), and one progress bar."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerState, TrainingArguments

from ..modeling.flops import peak_flops


class ThroughputCallback(TrainerCallback):
    """Measures tokens and FLOPs per second between two log entries, without the time of evaluations and saves.

    Waiting for data is included, and compilation of kernels in the first entry.
    """

    def __init__(self) -> None:
        self._start = self._step_end = 0.0
        self._tokens, self._flops = 0, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._start = self._step_end = time.perf_counter()
        self._tokens, self._flops = state.num_input_tokens_seen, state.total_flos

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._step_end = time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()  # nothing but evaluations and saves lies between the step's end and here
        self._start, self._step_end = self._start + now - self._step_end, now

    on_save = on_evaluate

    def read(self, args: TrainingArguments, state: TrainerState) -> dict[str, float]:
        """Return the throughput since the last reading.

        `tokens_per_second` of all devices (if tokens are counted), `tflops_per_device`, and `mfu` (if the device's peak
        is known).
        """
        now = time.perf_counter()
        seconds = now - self._start
        tokens, flops = state.num_input_tokens_seen - self._tokens, state.total_flos - self._flops
        self._start = self._step_end = now
        self._tokens, self._flops = state.num_input_tokens_seen, state.total_flos
        per_device = flops / args.world_size / seconds
        speed = {"tflops_per_device": float(f"{per_device / 1e12:.4g}")}
        if args.include_num_input_tokens_seen != "no":
            speed["tokens_per_second"] = round(tokens / seconds, 1)
        if (peak := peak_flops(args.device)) is not None:
            speed["mfu"] = round(per_device / peak, 4)
        return speed


class ProgressBar(ProgressCallback):
    """Trainer's bar on the first process, with loss, speed and memory; without a terminal, log lines as well."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs is not None and "loss" in logs:
            self.training_bar.set_postfix_str(summary(logs))
            if sys.stderr.isatty():
                return
        super().on_log(args, state, control, logs=logs, **kwargs)


def summary(logs: dict[str, Any]) -> str:
    """Return a log entry as one short line."""
    parts = {
        "loss": "loss {:.4f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "peak_memory_gib": "{:.1f} GiB",
        "measured_step_seconds": "step {:.3g} s",
        "predicted_step_seconds": "predicted {:.3g} s",
    }
    return ", ".join(form.format(logs[key]) for key, form in parts.items() if key in logs)
