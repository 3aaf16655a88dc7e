"""Runs that stop and continue: Trainer's hooks for exact resumes, complete checkpoints, SIGTERM and clear failures."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINING_ARGS_NAME

from ...modeling import LinearLlama3ForCausalLM, LinearLlama3ForMaskedLM
from ..accelerator import bare_model
from ..data.order import CompleteSteps, check_order, content_hash, data_order, repeated_rows, without_labels
from ..failures import annotate_errors, annotate_read_errors, annotate_write_errors
from ..finite_check import FiniteCheck
from ..hooks import check_trainer, temporarily
from . import manifest
from .preemption import SaveOnSigterm, outlive_sigterm
from .resume import find_checkpoint, stream_position, warn


class ReliabilityMixin(Trainer):
    """Put before a Trainer class, before or after SequenceParallelMixin: `class MyTrainer(ReliabilityMixin, Trainer)`.

    `enable_jit_checkpoint` of the arguments switches saving on SIGTERM on (unless `save_strategy` is "no"), and
    `logging_nan_inf_filter=False` stopping at a loss that is not finite.
    """

    train_dataset: Any
    batch_shape: tuple[int, int] | None = None  # (rows, tokens) of the last batch, before it is sharded
    order: dict[str, Any] | None = None  # `data_order` of the run
    _repeated: tuple[int, int] = (0, 0)
    _resumed_loss: tuple[float, int] | None = None  # (sum, steps) before the stop, which no log entry holds yet
    _first_step = 0  # at which this run started or resumed

    def __init__(
        self, model: Any = None, args: TrainingArguments | None = None, *further: Any, **keywords: Any
    ) -> None:
        check_trainer(type(self))
        with contextlib.ExitStack() as stack:
            if args is not None:
                manifest.make_folder(Path(args.output_dir))
                stack.enter_context(temporarily(args, enable_jit_checkpoint=False))  # transformers' signal handler
            super().__init__(model, args, *further, **keywords)
        self._finite_check = FiniteCheck(self)
        self._sigterm = SaveOnSigterm(self.accelerator)

    @property
    def _saves_on_sigterm(self) -> bool:
        return self.args.enable_jit_checkpoint and self.args.save_strategy != "no"

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train like Trainer.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint of output_dir; "latest" as well, or a new
                run if there is none; or a checkpoint's folder.

        Raises:
            ResumeError: a ValueError; a checkpoint is not complete, or this launch cannot continue from it exactly.
            TrainingFailure: the run cannot continue; with the step, the rank and a remedy.
            SystemExit: after a save that SIGTERM asked for.
        """
        checkpoint = find_checkpoint(self.args, resume_from_checkpoint)
        self._resumed_loss, self._first_step = None, 0
        self._finite_check = FiniteCheck(self)
        with contextlib.ExitStack() as stack:
            self.pop_callback(self._sigterm)
            if self._saves_on_sigterm:
                self.add_callback(self._sigterm)  # after all others
                stack.enter_context(self._sigterm.listening())
            stack.enter_context(annotate_errors(self))
            return super().train(checkpoint, *args, **kwargs)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Return the number of epochs, and of batches of the next one, that were trained on (Trainer's hook)."""
        position = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None:
            return position
        self._first_step = self.state.global_step
        if self._first_step >= max_steps:  # Trainer would train one more step
            warn(self.args, f"nothing is left to train: step {self._first_step} of {max_steps} is reached")
            return epochs, 0
        facts = manifest.read_facts(Path(resume_from_checkpoint))
        if facts.get("loss") is not None:
            self._resumed_loss = tuple(facts["loss"])
        if self.args.ignore_data_skip or self.order is None:
            return position
        if facts.get("order") is not None:
            check_order(self.order, facts["order"], accumulation=self.args.gradient_accumulation_steps)
        if epochs != sys.maxsize:
            return position
        return stream_position(resume_from_checkpoint, self.args.gradient_accumulation_steps)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Check the sizes of the weights, then load them (Trainer's hook)."""
        manifest.check_sizes(Path(resume_from_checkpoint), self.model if model is None else model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Report no tied weights as missing, since they are saved once (Trainer's hook)."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore this process's random state (Trainer's hook).

        It belongs to a number of processes. Another number starts with a new state, the same on all processes, since
        the ranks of a sequence may not differ.
        """
        saved = manifest.read_facts(Path(checkpoint)).get("processes") if checkpoint else None
        if saved is None or saved == self.args.world_size:
            super()._load_rng_state(checkpoint)
            return
        set_seed(self.args.seed + self.state.global_step)
        warn(
            self.args,
            f"random numbers (of dropout, for instance) start again, since {saved} processes saved and "
            f"{self.args.world_size} continue; everything else continues exactly",
        )

    def get_train_dataloader(self) -> DataLoader:
        """Return Trainer's loader; streams are distributed row by row, in complete steps."""
        dataset, rows_per_step = self.train_dataset, self.get_total_train_batch_size(self.args)
        if self.accelerator.split_batches:  # all processes share a batch; Trainer counts one for each
            rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        stream = isinstance(dataset, IterableDataset)
        with temporarily(self, train_dataset=CompleteSteps(dataset, rows_per_step) if stream else dataset):
            loader = super().get_train_dataloader()
        self.order = data_order(
            loader,
            rows_per_step=rows_per_step,
            rows_per_batch=rows_per_step // self.args.gradient_accumulation_steps,
            drop_last=self.args.dataloader_drop_last,
            content=content_hash(dataset),
        )
        self._repeated = repeated_rows(loader)
        if self._saves_on_sigterm and loader.num_workers:
            loader.base_dataloader.worker_init_fn = partial(outlive_sigterm, loader.worker_init_fn, self._sigterm.over)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return Trainer's batches. Rows that accelerate repeats at the end of an epoch do not count."""
        with annotate_read_errors(self):
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        own, repeated = self._repeated
        if own and self.accelerator.gradient_state.end_of_dataloader and self._ignores_rows_without_labels():
            last = batches[-1]
            if len(last.get("labels", ())) == own:  # otherwise rows are laid end to end
                self._uncount_tokens(last, repeated)
                batches[-1] = without_labels(last, repeated)
            count = self._get_num_items_in_batch(batches, device)
        return batches, count

    def _uncount_tokens(self, batch: dict[str, Any], rows: int) -> None:
        """Subtract the tokens of the last rows of all processes, since Trainer counts every row after the step."""
        before = self.state.num_input_tokens_seen
        self._track_num_input_tokens({name: x[len(x) - rows :] for name, x in batch.items()})
        self.state.num_input_tokens_seen = 2 * before - self.state.num_input_tokens_seen

    def _ignores_rows_without_labels(self) -> bool:
        """Return True if rows without labels add nothing: the loss is a sum over the labels of all processes."""
        model = bare_model(self.accelerator, self.model)
        ours = isinstance(model, (LinearLlama3ForCausalLM, LinearLlama3ForMaskedLM))
        return ours and self.args.average_tokens_across_devices and self.compute_loss_func is None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Train one micro-batch, and note its shape and its loss."""
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is not None:
            self.batch_shape = tokens.shape[0], tokens.shape[1]
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._finite_check.note(loss, args[0] if args else kwargs.get("num_items_in_batch"))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Check the gradient between the backward pass and the optimizer (Trainer's hook)."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._finite_check.check_norm(norm)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log like Trainer. The first entry of a resumed run covers the steps since the last entry before the stop."""
        if "loss" in logs:
            if self._resumed_loss is not None:
                (total, earlier), self._resumed_loss = self._resumed_loss, None
                steps = self.state.global_step - self._first_step
                logs["loss"] = (total + logs["loss"] * steps) / (earlier + steps)
            self._finite_check.check_logged(logs["loss"])
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint that is known to be complete, then remove older ones and upload (Trainer's hook).

        Trainer's own save does neither, since both need a complete checkpoint.
        """
        args, run_dir = self.args, Path(self._get_output_dir(trial))
        folder = manifest.folder_of(run_dir, self.state.global_step)
        facts = {"processes": args.world_size, "order": self.order, "loss": self._unlogged_loss()}
        with annotate_write_errors(self, folder):
            if args.should_save:
                manifest.begin(folder)
            self.accelerator.wait_for_everyone()
            with temporarily(args, save_total_limit=None, push_to_hub=False):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if args.should_save:
                torch.save(args, folder / TRAINING_ARGS_NAME)  # with the values that were set aside
                manifest.finish(folder, facts)
                manifest.rotate(run_dir, args.save_total_limit, saved=folder, best=self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _unlogged_loss(self) -> tuple[float, int] | None:
        """Return (sum, steps) of the loss since the last log entry, of all processes."""
        steps = self.state.global_step - self._globalstep_last_logged
        if not steps:
            return None
        loss = self.accelerator.gather(self._tr_loss.reshape(1)).mean().item()
        total, earlier = self._resumed_loss or (0, 0)
        return loss + total, steps + earlier
