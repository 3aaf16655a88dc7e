"""transformers' Trainer, every sequence spread over the processes of the mesh axis `cp`.

Peers in `cp` load the same batch (accelerate's loaders follow the mesh), `shard_batch` cuts it, and the loss of a
shard is its sum over the global number of labels. Trainer multiplies by the number of processes and DDP or FSDP
averages over them, so loss, gradients and their norm are those of one process.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer
from transformers.utils import logging

from ..modeling import (
    LinearLlama3ForCausalLM,
    LinearLlama3ForMaskedLM,
    LinearLlama3PreTrainedModel,
    enable_sequence_tiling,
)
from ..modeling.flops import batch_flops
from ..modeling.hub import write_shim
from ..modeling.model_card import add_card
from ..sequence_parallel import SequenceParallelContext, enable_sequence_parallel, unshard
from ..sequence_parallel.collectives import all_reduce
from .adaptive.trainer import AdaptiveMixin
from .arguments import sequence_parallel_config
from .checkpoints.reliability import ReliabilityMixin
from .launched import check_launch
from .memory.peak import peak_memory
from .noise import EmbeddingNoise
from .parallelism import (
    PeerCheck,
    attach,
    check_dtypes,
    check_overrides,
    hidden_parallelism,
    is_sharded_by,
    keep_precision,
    resolve_parallelism,
    uses_fsdp,
)
from .progress import ProgressBar, SpeedMeter
from .validation import TokenMeanMixin

logger = logging.get_logger(__name__)

LANGUAGE_MODELS = (LinearLlama3ForCausalLM, LinearLlama3ForMaskedLM)  # whose loss needs no logits


class SequenceParallelMixin(ReliabilityMixin):
    """Put before a Trainer class: `class MyTrainer(SequenceParallelMixin, SFTTrainer)`.

    Reads `sequence_parallel_size`, `linear_strategy`, `softmax_strategy` and `sequence_layout` of the arguments
    where there are any; plain TrainingArguments take all processes, LASP-2 and LASP-2H.

    A class that overrides `compute_loss` or `_prepare_inputs` must set `handles_shards = True`: these methods receive
    this rank's part of a batch, with `shift_labels`, and `num_items_in_batch` of the complete batch.
    """

    sequence_parallel_context: SequenceParallelContext | None = None
    _check_peers: PeerCheck
    _batch_is_whole = False  # an evaluation batch that nobody has counted and cut yet
    _batch_tokens: Tensor  # number of tokens in the last complete batch, without padding
    _noise: EmbeddingNoise | None = None  # while training with NEFTune on parts of sequences

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's hook: builds the Accelerator, then gives it the `cp` axis."""
        self._create_accelerator()
        keep_precision(self.accelerator)

    def _create_accelerator(self) -> None:
        args: Any = self.args  # type: ignore[attr-defined]
        check_launch(args.world_size)
        parallelism = resolve_parallelism(args.parallelism_config, self._wanted_degree(), args.world_size)
        if parallelism is None:
            super().create_accelerator_and_postprocess()  # type: ignore[misc]
            return
        self._check_arguments(args)
        check_overrides(type(self))
        args.parallelism_config = parallelism if uses_fsdp(args.fsdp_plugin_args, cpu=args.use_cpu) else None
        with hidden_parallelism():
            super().create_accelerator_and_postprocess()  # type: ignore[misc]
        args.parallelism_config = parallelism
        self._check_peers = PeerCheck()
        self.sequence_parallel_context = attach(self.accelerator, parallelism, sequence_parallel_config(args))
        self.gather_function = functools.partial(
            self.accelerator.gather_for_metrics, use_gather_object=args.eval_use_gather_object
        )

    def _wanted_degree(self) -> int | str:
        return getattr(self.args, "sequence_parallel_size", "auto")  # type: ignore[attr-defined]

    @staticmethod
    def _check_arguments(args: Any) -> None:
        if args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor must be 0 under sequence parallelism (the Trainer's smoother shifts labels "
                f"inside each shard), got {args.label_smoothing_factor}"
            )
        if args.accelerator_config.dispatch_batches:
            raise ValueError(
                "dispatch_batches must be False under sequence parallelism (the dispatcher would hand every process "
                "other rows), got True; leave it out of accelerator_config"
            )
        args.accelerator_config.dispatch_batches = False
        if not args.average_tokens_across_devices:
            logger.warning_once(
                "average_tokens_across_devices=False: the loss is the mean of the data-parallel processes' means, "
                "and depends on how many of them there are"
            )

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Trainer's hook: this rank's part of the batch."""
        context = self.sequence_parallel_context
        if context is None:
            return super()._prepare_context_parallel_inputs(model, inputs)  # type: ignore[misc]
        self._check_loss_functions()
        if not is_sharded_by(model, context):
            enable_sequence_parallel(model, context)
        self._check_peers(context, inputs)
        self._batch_is_whole = False
        self._prepare_noise(model, inputs)
        if hasattr(self, "_total_train_tokens"):  # SFTTrainer's
            tokens, mask = inputs.get("input_ids", inputs.get("inputs_embeds")), inputs.get("attention_mask")
            self._batch_tokens = torch.tensor(tokens.shape[:2].numel()) if mask is None else mask.sum()  # type: ignore[union-attr]
        return contextlib.nullcontext, context.shard_batch(inputs)

    def _check_loss_functions(self) -> None:
        for name in ("compute_loss_func", "label_smoother"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is not possible under sequence parallelism: it would see one shard and labels without "
                    "their neighbours; let the model compute the loss"
                )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; the ranks of a sequence compare their batches from the first one on, also after a resume."""
        self._check_peers = PeerCheck()
        if self.is_fsdp_enabled:  # type: ignore[attr-defined]
            check_dtypes(self.model, self.accelerator.mixed_precision)  # type: ignore[attr-defined]
        if self.sequence_parallel_context is not None:
            self._check_loss_functions()
        if self.args.world_size > 1 and not self.is_fsdp_enabled:  # type: ignore[attr-defined]
            # an evaluation marks the bare model as prepared, and accelerate would then train it without DDP
            self.model._is_accelerate_prepared = False  # type: ignore[attr-defined]
        alpha = self.neftune_noise_alpha  # type: ignore[has-type]
        if alpha is None or not self._holds_parts:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        self._noise, self.neftune_noise_alpha = EmbeddingNoise(alpha, self.args.process_index), None  # type: ignore[attr-defined]
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._noise.remove()
            self._noise, self.neftune_noise_alpha = None, alpha

    @property
    def _holds_parts(self) -> bool:
        """True if a process holds parts of sequences."""
        return self.sequence_parallel_context is not None

    def _prepare_noise(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Set NEFTune's noise for the forward pass over a complete `batch`."""
        if self._noise is not None:
            tokens = batch.get("input_ids", batch.get("inputs_embeds"))
            embedding = self.accelerator.unwrap_model(model).get_input_embeddings()
            self._noise.prepare(embedding, tokens.shape[1])  # type: ignore[union-attr]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Trainer's hook: count every label of complete batches once. Some releases of transformers round the quotient.

        Returns:
            An integer tensor or a Python number, which mixed precision does not round, or None.
        """
        state, context = self.accelerator.state, self.sequence_parallel_context
        if context is None:
            count = super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
            return count.round().long() if isinstance(count, torch.Tensor) else count
        parallelism, state.parallelism_config = state.parallelism_config, None
        try:
            count = super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        finally:
            state.parallelism_config = parallelism
        if count is None:
            return None
        if self.args.average_tokens_across_devices:  # type: ignore[attr-defined]
            return (count / context.world_size).round().long()  # a sum over all processes, so a multiple
        return count.item() / context.world_size

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Trainer's hook: all ranks of a sequence count the same batch."""
        before = self.state.num_input_tokens_seen  # type: ignore[attr-defined]
        super()._track_num_input_tokens(inputs)  # type: ignore[misc]
        if self.sequence_parallel_context is not None:
            seen = self.state.num_input_tokens_seen - before  # type: ignore[attr-defined]
            self.state.num_input_tokens_seen = before + seen // self.sequence_parallel_context.world_size  # type: ignore[attr-defined]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Trainer's; TRL's SFTTrainer comes here in an evaluation with a batch that is neither counted nor cut."""
        if self._batch_is_whole:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)  # type: ignore[attr-defined]
            _, inputs = self._prepare_context_parallel_inputs(model, inputs)
        tokens = getattr(self, "_total_train_tokens", None)  # SFTTrainer's count, which treats a part as one row
        loss = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if tokens is not None and self.sequence_parallel_context is not None and model.training:
            counted = self.accelerator.gather(self._batch_tokens.to(self.args.device)).sum().item()  # type: ignore[attr-defined]
            self._total_train_tokens = tokens + counted // self.sequence_parallel_context.world_size
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]  # type: ignore[attr-defined]
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Trainer's hook: this process's share of a batch's FLOPs, forward and backward, as flops.py counts them."""
        context = self.sequence_parallel_context
        model: nn.Module = self.model  # type: ignore[attr-defined]
        ours = any(isinstance(module, LinearLlama3PreTrainedModel) for module in model.modules())
        flops = batch_flops(model, inputs).training if ours else super().floating_point_ops(inputs)  # type: ignore[misc]
        return flops / (1 if context is None else context.world_size)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Like Trainer's: the exact loss if there are labels, and the logits of complete sequences."""
        context = self.sequence_parallel_context
        if context is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is None:
            raise ValueError(f"a batch needs input_ids or inputs_embeds, got {sorted(inputs)}")
        rows, length = tokens.shape[:2]
        if inputs.get("labels") is None:  # Trainer's step then calls the model without a loss
            _, inputs = self._prepare_context_parallel_inputs(model, self._prepare_inputs(inputs))  # type: ignore[attr-defined]
        else:
            self._batch_is_whole = True
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
        if loss is not None and context.group is not None:  # of a shard: Trainer would average only some of them
            loss = all_reduce(loss, context.group).wait() / context.world_size
        if logits is None:
            return loss, None, None
        if not isinstance(logits, torch.Tensor):
            raise ValueError(
                "under sequence parallelism evaluation returns logits alone, got further outputs; set "
                "output_hidden_states=False or prediction_loss_only=True"
            )
        total = rows * length if logits.shape[0] != rows else length  # packed rows were laid end to end
        logits = unshard(logits, group=context.group, length=total, layout=context.layout)
        return loss, logits.reshape(rows, length, -1), labels


class LinearLlama3Trainer(TokenMeanMixin, AdaptiveMixin, SequenceParallelMixin, Trainer):
    """transformers' Trainer with sequence parallelism: launch it on several processes, nothing else changes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.speed_meter = SpeedMeter()
        self.add_callback(self.speed_meter)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressBar)
        self._enable_tiling(self.model)
        if self.adapts:
            self.prepare_groups()

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which makes the model anew for every run."""
        model = super().call_model_init(*args, **kwargs)
        self._enable_tiling(model)
        return model

    def _enable_tiling(self, model: nn.Module) -> None:
        if getattr(self.args, "sequence_tiling", False):
            enable_sequence_tiling(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As Trainer's, without logits that nobody reads."""
        if not return_outputs and self._can_skip_logits(inputs):
            inputs = {**inputs, "skip_logits": True}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As the mixin's, without logits that nobody reads."""
        if prediction_loss_only and self._can_skip_logits(inputs):
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _can_skip_logits(self, inputs: dict[str, Any]) -> bool:
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's
        if not (getattr(self.args, "chunked_loss", True) and isinstance(model, LANGUAGE_MODELS)):
            return False
        if self.label_smoother is not None or self.compute_loss_func is not None:
            logger.warning_once(
                "label smoothing and compute_loss_func read the logits of all tokens: chunked_loss is off"
            )
            return False
        return inputs.get("labels") is not None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with speed (`SpeedMeter.read`) and this process's peak memory beside the loss."""
        if "loss" in logs and self.is_in_train:
            logs |= self.speed_meter.read(self.args, self.state)
            logs["peak_memory_gib"] = round(peak_memory() / 2**30, 3)
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's; without facts from the caller (so in a push) the model's own card, which knows its layers."""
        facts = bool(args) or not kwargs.keys() <= {"model_name", "tags"}
        if facts or not isinstance(self.model, LinearLlama3PreTrainedModel):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            add_card(self.model, folder, self.hub_model_id or folder.resolve().name)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer's hook for uploads during the run, which knows only the files that every model has."""
        if isinstance(self.model, LinearLlama3PreTrainedModel) and self.is_world_process_zero():
            write_shim(self.args.output_dir)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)
