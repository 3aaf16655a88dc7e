"""Sequence parallelism for any Trainer class: every sequence is sharded over the processes of the mesh axis `cp`.

All ranks of a sequence load the same batch (accelerate's loaders follow the mesh), `shard_batch` cuts it, and the loss
of a shard is its sum over the global number of labels. Trainer multiplies it by the number of processes, and DDP or
FSDP averages over them, so loss, gradients and their norm equal those of one process.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from ..modeling import LinearLlama3PreTrainedModel
from ..modeling.flops import batch_flops
from ..sequence_parallel import SequenceParallelContext, enable_sequence_parallel, unshard
from ..sequence_parallel.collectives import all_reduce
from .accelerator import SequenceParallelAccelerator
from .arguments import sequence_parallel_config
from .hooks import check_overrides, check_trainer, temporarily
from .launched import check_launch
from .noise import EmbeddingNoise
from .parallelism import PeerCheck, check_dtypes, keep_precision, resolve_parallelism, set_timeout, visible_parallelism

logger = logging.get_logger(__name__)


class SequenceParallelMixin(Trainer):
    """Put before a Trainer class: `class MyTrainer(SequenceParallelMixin, SFTTrainer)`.

    Reads `sequence_parallel_size`, `linear_strategy`, `softmax_strategy` and `sequence_layout` of the arguments where
    they exist; with plain TrainingArguments all processes share every sequence, by LASP-2 and LASP-2H.

    A class that overrides `compute_loss` or `_prepare_inputs` must set `handles_shards = True`: these methods receive
    this rank's part of a batch, with `shift_labels`, and `num_items_in_batch` of the complete batch.
    """

    accelerator: Any
    neftune_noise_alpha: float | None
    sequence_parallel_context: SequenceParallelContext | None = None
    _accelerator_arguments: dict[str, Any]
    _awaits_sharding = False  # True for an evaluation batch that no hook has counted and cut yet
    _batch_tokens: Tensor  # number of tokens in the last complete batch, without padding
    _noise: EmbeddingNoise | None = None  # while training with NEFTune on parts of sequences

    def create_accelerator_and_postprocess(self) -> None:
        """Build our own Accelerator from Trainer's arguments (Trainer's hook)."""
        check_trainer(type(self))
        args: Any = self.args
        check_launch(args.world_size)
        parallelism = resolve_parallelism(args.parallelism_config, self._wanted_degree(), args.world_size)
        if parallelism is None:
            super().create_accelerator_and_postprocess()
        else:
            self._check_arguments(args)
            check_overrides(type(self))
            with visible_parallelism(parallelism, args.fsdp_plugin_args, cpu=args.use_cpu) as visible:
                args.parallelism_config = visible
                super().create_accelerator_and_postprocess()
            args.parallelism_config = parallelism
            self.accelerator = SequenceParallelAccelerator(
                **{**self._accelerator_arguments, "parallelism_config": parallelism, "cpu": args.use_cpu},
                sequence_parallel_config=sequence_parallel_config(args),
            )
            self.sequence_parallel_context = self.accelerator.sequence_parallel_context
            self.gather_function = functools.partial(
                self.accelerator.gather_for_metrics, use_gather_object=args.eval_use_gather_object
            )
        keep_precision(self.accelerator)
        set_timeout(self.accelerator, args.ddp_timeout)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Keep the arguments with which Trainer builds its Accelerator (Trainer's hook)."""
        self._accelerator_arguments = super()._build_accelerator_args(**kwargs)
        return self._accelerator_arguments

    def _wanted_degree(self) -> int | str:
        return getattr(self.args, "sequence_parallel_size", "auto")

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
                "and depends on their number"
            )

    @property
    def _ranks(self) -> int:
        """Number of ranks that share a sequence."""
        return 1 if self.sequence_parallel_context is None else self.sequence_parallel_context.world_size

    @property
    def _shards_sequences(self) -> bool:
        """True if a process holds parts of sequences."""
        return self.sequence_parallel_context is not None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train like Trainer. The ranks of a sequence compare their first batch, also after a resume."""
        if isinstance(self.accelerator, SequenceParallelAccelerator):
            self.accelerator.check_peers = PeerCheck()
        if self.is_fsdp_enabled:
            check_dtypes(self.model, self.accelerator.mixed_precision)
        elif self.args.world_size > 1:
            # an evaluation marks the bare model as prepared, and accelerate would then train it without DDP
            self.model._is_accelerate_prepared = False
        alpha = self.neftune_noise_alpha
        if alpha is None or not self._shards_sequences:
            return super().train(*args, **kwargs)
        noise = EmbeddingNoise(alpha, self.args.process_index)
        with contextlib.closing(noise), temporarily(self, _noise=noise, neftune_noise_alpha=None):
            return super().train(*args, **kwargs)

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return this rank's part of the batch (Trainer's hook)."""
        context = self.sequence_parallel_context
        if context is None:
            return super()._prepare_context_parallel_inputs(model, inputs)
        for name in ("compute_loss_func", "label_smoother"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is not possible under sequence parallelism: it would see one shard and labels without "
                    "their neighbors; let the model compute the loss"
                )
        if not any(getattr(module, "sequence_parallel_context", None) is context for module in model.modules()):
            enable_sequence_parallel(model, context)
        self._awaits_sharding = False
        self.prepare_noise(model, inputs)
        if hasattr(self, "_total_train_tokens"):  # SFTTrainer's
            tokens, mask = inputs.get("input_ids", inputs.get("inputs_embeds")), inputs.get("attention_mask")
            self._batch_tokens = torch.tensor(tokens.shape[:2].numel()) if mask is None else mask.sum()  # type: ignore[union-attr]
        return contextlib.nullcontext, self.accelerator.shard_batch(inputs)

    def prepare_noise(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Set NEFTune's noise for the forward pass over a complete `batch`."""
        if self._noise is not None:
            tokens = batch.get("input_ids", batch.get("inputs_embeds"))
            embedding = self.accelerator.unwrap_model(model).get_input_embeddings()
            self._noise.prepare(embedding, tokens.shape[1])  # type: ignore[union-attr]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count every label of complete batches once (Trainer's hook), since some releases round the quotient.

        Returns:
            An integer tensor or a Python number, which mixed precision does not round, or None.
        """
        if self.sequence_parallel_context is None:
            count = super()._get_num_items_in_batch(batch_samples, device)
            return count.round().long() if isinstance(count, torch.Tensor) else count
        with temporarily(self.accelerator.state, parallelism_config=None):
            count = super()._get_num_items_in_batch(batch_samples, device)
        if count is None:
            return None
        if self.args.average_tokens_across_devices:
            return (count / self._ranks).round().long()  # a sum over all processes, so a multiple
        return count.item() / self._ranks

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens of a sequence once, although all of its ranks hold the batch (Trainer's hook)."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self._ranks

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Return this process's share of a batch's training FLOPs, as flops.py counts them (Trainer's hook)."""
        ours = any(isinstance(module, LinearLlama3PreTrainedModel) for module in self.model.modules())
        flops = batch_flops(self.model, inputs).training if ours else super().floating_point_ops(inputs)
        return flops / self._ranks

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the loss like Trainer; TRL's SFTTrainer calls it in evaluations with a batch that is not yet cut."""
        if self._awaits_sharding:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
            _, inputs = self._prepare_context_parallel_inputs(model, inputs)
        tokens = getattr(self, "_total_train_tokens", None)  # SFTTrainer's count, which treats a part as one row
        loss = super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if tokens is not None and self.sequence_parallel_context is not None and model.training:
            counted = self.accelerator.gather(self._batch_tokens.to(self.args.device)).sum().item()
            self._total_train_tokens = tokens + counted // self._ranks
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return the exact loss if there are labels, and the logits of complete sequences (Trainer's hook)."""
        context = self.sequence_parallel_context
        if context is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is None:
            raise ValueError(f"a batch needs input_ids or inputs_embeds, got {sorted(inputs)}")
        rows, length = tokens.shape[:2]
        if inputs.get("labels") is None:  # Trainer's step then calls the model without a loss
            _, inputs = self._prepare_context_parallel_inputs(model, self._prepare_inputs(inputs))
        else:
            self._awaits_sharding = True
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and context.group is not None:  # of a shard: Trainer would average only some of them
            loss = all_reduce(loss, context.group).wait() / context.world_size
        if logits is None:
            return loss, None, None
        if not isinstance(logits, torch.Tensor):
            raise ValueError(
                "under sequence parallelism evaluation returns logits alone, got further outputs; set "
                "output_hidden_states=False or prediction_loss_only=True"
            )
        total = rows * length if logits.shape[0] != rows else length  # packed rows are concatenated
        logits = unshard(logits, group=context.group, length=total, layout=context.layout)
        return loss, logits.reshape(rows, length, -1), labels
