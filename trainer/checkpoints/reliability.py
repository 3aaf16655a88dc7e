"""Hooks into transformers' Trainer for runs that stop and go on: exact resumes, whole checkpoints, clear failures."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerState, set_seed
from transformers.utils import logging

from ...modeling import LinearLlama3ForCausalLM, LinearLlama3ForMaskedLM
from ..data.order import DataOrder, WholeSteps, content_hash, repeated_rows, without_labels
from ..failures import FiniteCheck, explained, reading, saving
from ..hooks import check_trainer
from ..parallelism import set_timeout
from . import manifest
from .manifest import LATEST
from .preemption import EXIT_CODE, SaveOnSigterm, outlive_sigterm

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.get_logger(__name__)

ARGUMENTS_NAME = "training_args.bin"


class ReliabilityMixin(_Trainer):
    """Put before a Trainer class; SequenceParallelMixin brings it along.

    `enable_jit_checkpoint` of the arguments switches saving on SIGTERM on (unless `save_strategy` is "no"), and
    `logging_nan_inf_filter=False` stopping at a loss that is not finite.
    """

    train_dataset: Any
    batch_shape: tuple[int, int] | None = None  # (rows, tokens) of the last batch, uncut
    _order: DataOrder | None = None
    _repeated: tuple[int, int] = (0, 0)
    _pending_loss: tuple[float, int] | None = None  # (sum, steps) of a resumed run, not yet logged
    _filled: tuple[Any, int] = (None, 0)  # a batch with repeated rows, and its rows before them
    _unpushed: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_trainer(type(self))
        super().__init__(*args, **kwargs)
        self.args.enable_jit_checkpoint = self._jit_checkpoint
        self._finite_check = FiniteCheck(self)
        set_timeout(self.accelerator, self.args.ddp_timeout)
        self._sigterm = SaveOnSigterm(self.accelerator)
        if self._saves_on_sigterm:
            self.add_callback(self._sigterm)

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's hook, here to keep transformers' own signal handler from being installed."""
        self._jit_checkpoint, self.args.enable_jit_checkpoint = self.args.enable_jit_checkpoint, False
        super().create_accelerator_and_postprocess()
        manifest.make_folder(Path(self.args.output_dir))

    @property
    def _saves_on_sigterm(self) -> bool:
        return self.args.enable_jit_checkpoint and self.args.save_strategy != "no"

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. `resume_from_checkpoint=True` takes the newest whole checkpoint, "latest" as well, or starts
        anew where there is none.

        Raises:
            ResumeError: a ValueError; a checkpoint that is not whole, or that this launch cannot go on from exactly.
            TrainingFailure: with the step, the rank and a remedy, if the run cannot go on.
            SystemExit: after a save that SIGTERM asked for.
        """
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        self._pending_loss = None
        self._finite_check = FiniteCheck(self)
        with self._sigterm.listening() if self._saves_on_sigterm else contextlib.nullcontext(), explained(self):
            return super().train(checkpoint, *args, **kwargs)

    # ---- where to go on

    def _find_checkpoint(self, wanted: str | bool | None) -> str | None:
        if wanted is None or wanted is False:
            return None
        if wanted is not True and wanted != LATEST:
            if (trouble := self._trouble(Path(wanted))) is not None:
                newest = manifest.newest(Path(wanted).parent)
                remedy = f"{newest} is" if newest else f"none in {Path(wanted).parent} is"
                raise manifest.ResumeError(f"resume_from_checkpoint must be whole, got {wanted}: {trouble}; {remedy}")
            return self._with_optimizer(Path(wanted))
        output_dir = Path(self.args.output_dir)
        steps = sorted(set(itertools.chain(*gather_object([manifest.steps(output_dir)]))), reverse=True)
        for step in steps:
            folder = manifest.folder_of(output_dir, step)
            if (trouble := self._trouble(folder)) is None:
                return self._with_optimizer(folder)
            self._warn(f"{folder} is not whole: {trouble}; the one before it is tried")
        if wanted == LATEST:
            return None
        raise manifest.ResumeError(
            f"resume_from_checkpoint=True needs a whole checkpoint in output_dir, got {output_dir} with none; "
            f'"{LATEST}" starts anew in that case'
        )

    @staticmethod
    def _with_optimizer(folder: Path) -> str:
        if not any(folder.glob("optimizer*")):  # Trainer would begin with a new one
            raise manifest.ResumeError(
                f"a resumed run needs the optimizer's state, got {folder} without it (save_only_model=True); load its "
                "weights as those of a new run"
            )
        return str(folder)

    def _trouble(self, folder: Path) -> str | None:
        """What any machine finds wrong with a checkpoint; the same on all processes."""
        own = manifest.find_defect(folder) if self.args.local_process_index == 0 else None
        return next((trouble for trouble in gather_object([own]) if trouble is not None), None)

    def _warn(self, message: str) -> None:
        if self.args.process_index == 0:
            logger.warning(message)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Trainer's hook: how many epochs, and batches of the next one, were trained on."""
        position = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None:
            return position
        if self.state.global_step >= max_steps:  # Trainer would take one more step
            self._warn(f"nothing is left to train: step {self.state.global_step} of {max_steps} is reached")
            return epochs, 0
        facts = manifest.read_facts(Path(resume_from_checkpoint))
        self._pending_loss = facts.get("loss")
        if self.args.ignore_data_skip or self._order is None:
            return position
        if facts.get("order") is not None:
            self._order.check(facts["order"], accumulation=self.args.gradient_accumulation_steps)
        if epochs != sys.maxsize:
            return position
        # A stream without a length: its passes count as epochs of max_steps, of which Trainer knows the first only.
        state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, manifest.STATE_NAME))
        passes = math.ceil(state.epoch) - 1
        steps = round((state.epoch - passes) * state.max_steps)
        return passes, steps * self.args.gradient_accumulation_steps

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Trainer's hook: check the sizes of the weights, then load them."""
        manifest.check_sizes(Path(resume_from_checkpoint), self.model if model is None else model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Trainer's hook: report no tied weights as missing, since they are saved once."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's hook: the random state of this process. It belongs to a number of processes; another one begins
        with a state that is the same on all of them, for the ranks of a sequence may not differ."""
        saved = manifest.read_facts(Path(checkpoint)).get("processes") if checkpoint else None
        if saved is None or saved == self.args.world_size:
            super()._load_rng_state(checkpoint)
            return
        set_seed(self.args.seed + self.state.global_step)
        self._warn(
            f"random numbers (of dropout, for instance) begin anew, as {saved} processes saved and "
            f"{self.args.world_size} go on; everything else goes on exactly"
        )

    # ---- the data

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's; streams are dealt out row by row, in whole steps."""
        dataset, rows_per_step = self.train_dataset, self.get_total_train_batch_size(self.args)
        if self.accelerator.split_batches:  # a batch is shared by all processes; Trainer counts one for each
            rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        if isinstance(dataset, IterableDataset):
            self.train_dataset = WholeSteps(dataset, rows_per_step)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.train_dataset = dataset
        self._order = DataOrder.of(
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
        """As Trainer's; rows that accelerate repeats at the end of an epoch do not count."""
        with reading(self):
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        own, repeated = self._repeated
        if own and self.accelerator.gradient_state.end_of_dataloader and self._counts_labels():
            if repeated and len(batches[-1].get("labels", ())) == own:  # else rows are laid end to end
                batches[-1] = without_labels(batches[-1], repeated)
                self._filled = batches[-1], own - repeated
            count = self._get_num_items_in_batch(batches, device)
        return batches, count

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Trainer's hook: repeated rows were seen before."""
        batch, rows = self._filled
        super()._track_num_input_tokens({k: v[:rows] for k, v in inputs.items()} if inputs is batch else inputs)

    def _counts_labels(self) -> bool:
        """Whether a batch without labels adds nothing: its loss is a sum over the labels of all processes."""
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's
        language_model = isinstance(model, (LinearLlama3ForCausalLM, LinearLlama3ForMaskedLM))
        return language_model and self.args.average_tokens_across_devices and self.compute_loss_func is None

    # ---- steps

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is not None:
            self.batch_shape = tokens.shape[0], tokens.shape[1]
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._finite_check.note(loss, args[0] if args else kwargs.get("num_items_in_batch"))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's hook, between the backward pass and the optimizer."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._finite_check.check_norm(norm)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._finite_check.check_logged(logs["loss"])
        super().log(logs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's hook at the end of a step."""
        if self._pending_loss is not None:
            loss, steps = self._pending_loss
            self._tr_loss += loss
            self._total_loss_scalar -= loss  # of this run's steps only
            self._globalstep_last_logged -= steps
            self._pending_loss = None
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._sigterm.agreed:
            self._warn(
                f"SIGTERM: step {self.state.global_step} is saved in {self.args.output_dir}; "
                f'resume_from_checkpoint="{LATEST}" goes on from there'
            )
            raise SystemExit(EXIT_CODE)

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's hook: a checkpoint that is known to be whole, and only then the end of older ones."""
        run_dir = Path(self._get_output_dir(trial))
        folder = manifest.folder_of(run_dir, self.state.global_step)
        with saving(self, folder):
            facts = {
                "processes": self.args.world_size,
                "order": None if self._order is None else asdict(self._order),
                "loss": self._unlogged_loss(),
            }
            if self.args.should_save:
                manifest.begin(folder)
            self.accelerator.wait_for_everyone()
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                torch.save(self.args, folder / ARGUMENTS_NAME)  # with the limit
                manifest.finish(folder, facts)
                manifest.rotate(run_dir, limit, saved=folder, best=self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        if self._unpushed is not None:
            super()._push_from_checkpoint(self._unpushed)
            self._unpushed = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer's hook, in the middle of a save: the upload waits for its end."""
        self._unpushed = checkpoint_folder

    def _unlogged_loss(self) -> tuple[float, int] | None:
        """(sum, steps) of the loss since the last log entry, of all processes."""
        steps = self.state.global_step - self._globalstep_last_logged
        return (self.accelerator.gather(self._tr_loss.reshape(1)).mean().item(), steps) if steps else None
