"""The context in which a model runs on a shard of every sequence: the group, the strategies, the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops.cross_entropy import IGNORE_INDEX
from .batch import normalize_batch
from .collectives import check_group, group_rank, world_size
from .layout import check_length, get_layout, shard
from .linear.attention import PendingLinearAttention, get_linear_strategy, start_linear_attention
from .softmax.attention import get_softmax_strategy, softmax_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceParallelConfig:
    """The strategies for both kinds of layers and the layout, by name.

    Strategy "auto" is the cheapest one for the sizes of each call (`costs.py`); layout "auto" is zigzag for models
    with softmax layers, whose causal work it balances, and contiguous for purely linear ones, whose states it would
    double.
    """

    linear: str = "lasp2"
    softmax: str = "lasp2h"
    layout: str = "auto"

    def __post_init__(self) -> None:
        if self.linear != "auto":
            get_linear_strategy(self.linear)
        if self.softmax != "auto":
            get_softmax_strategy(self.softmax)
        if self.layout != "auto":
            get_layout(self.layout)


class SequenceParallelContext:
    """One sequence-parallel group, whose ranks hold shards of the same sequences.

    Copies of a model (`copy.deepcopy`, `torch.optim.swa_utils.AveragedModel`) share its context, so they
    run sharded too. A pickle (`torch.save(model)`) stores None instead of the context, since a process group has no
    meaning in another process. The loaded model is not sharded until `enable_sequence_parallel` is called again.

    Args:
        group: the ranks, in the order of the sequence; None is a group of one.
        config: strategies and layout.
    """

    def __init__(self, group: dist.ProcessGroup | None, config: SequenceParallelConfig | None = None) -> None:
        check_group(group)
        self.group = group
        self.config = config or SequenceParallelConfig()
        self._layout = None if self.config.layout == "auto" else self.config.layout
        self.causal = True  # False once a bidirectional model is enabled, whose tokens would see padding

    def __copy__(self) -> SequenceParallelContext:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceParallelContext:
        return self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _no_context, ()

    @property
    def layout(self) -> str:
        """Name of the layout. Enabling the first model resolves "auto"; sharding or attention before that resolves it
        to "contiguous". It never changes afterwards, so shards and attention always have the same layout."""
        return self._layout or "auto"

    def _resolved_layout(self) -> str:
        self._layout = self._layout or "contiguous"
        return self._layout

    def resolve_layout(self, model: nn.Module) -> None:
        """Resolve "auto" to the layout that suits `model`, once, and note whether the model is causal."""
        layers = [module for module in model.modules() if hasattr(module, "layer_type")]
        causal = all(getattr(layer, "is_causal", True) for layer in layers)
        self.causal &= causal
        if self._layout is None:
            softmax = any(layer.layer_type == "full_attention" for layer in layers)
            self._layout = "zigzag" if softmax and causal else "contiguous"

    def positions(self, tokens: int, device: torch.device | None = None) -> Tensor:
        """Global positions `[C]` of this rank's `tokens` local ones, padding included."""
        ranks, total, layout = self.world_size, tokens * self.world_size, self._resolved_layout()
        check_length(tokens, ranks, layout, total)
        spans = get_layout(layout, ranks).spans(self.rank, ranks, total, total)
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in spans])

    @property
    def rank(self) -> int:
        return group_rank(self.group)

    @property
    def world_size(self) -> int:
        return world_size(self.group)

    def start_linear_attention(self, k: Tensor, v: Tensor, **options: Any) -> PendingLinearAttention:
        """`sequence_parallel.start_linear_attention` with this context's group, strategy and layout."""
        return start_linear_attention(
            k, v, group=self.group, strategy=self.config.linear, layout=self._resolved_layout(), **options
        )

    def softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """`sequence_parallel.softmax_attention` with this context's group, strategy and layout."""
        layout = self._resolved_layout()
        return softmax_attention(q, k, v, group=self.group, strategy=self.config.softmax, layout=layout, **options)

    def shard_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Cut this rank's shard from a batch that every rank of the group holds completely.

        Labels are shifted before the cut, so that no target is lost at an edge; positions stay global; rows that
        pack documents become one row (batch of 1), with the edges of all documents as `cu_seq_lens_q/k`. The end
        is padded to the same number of tokens on every rank, without labels.

        Args:
            batch: `input_ids` `[B, T]` or `inputs_embeds` `[B, T, D]`, and any of `labels`, `shift_labels`,
                `position_ids` (or `[1, T]`), `attention_mask` `[B, T]` (right padding only; in bidirectional models
                padding forms separate documents), `cu_seq_lens_q/k` `[N + 1]`, `seq_idx` `[B, T]`. Entries that are not
                cut (numbers, `num_items_in_batch`) pass through.

        Returns:
            The same keys, sharded, without `attention_mask` and `seq_idx`, with `position_ids` and, if there are
            labels, `shift_labels`.

        Raises:
            ValueError: there is padding to the left of a token, descriptions of documents contradict each other, or
                shapes do not match.
        """
        layout, ranks = self._resolved_layout(), self.world_size
        rule = get_layout(layout, ranks)
        complete = normalize_batch(batch, causal=self.causal, padded=lambda length: rule.padded(length, ranks))
        local = dict(complete.uncut)
        for name, x in complete.sequences.items():
            padding = IGNORE_INDEX if name in ("labels", "shift_labels") else 0
            local[name] = shard(x, group=self.group, layout=layout, padding=padding).contiguous()
        if complete.edges is not None:
            local["cu_seq_lens_q"] = local["cu_seq_lens_k"] = complete.edges
        return local


def _no_context() -> None:
    """Stand in for a context when a pickle is loaded."""


def enable_sequence_parallel(model: nn.Module, context: SequenceParallelContext | None) -> None:
    """Give `context` to every attention layer of `model`; None makes them plain attention again.

    Raises:
        ValueError: the model has no layer that supports sequence parallelism, or a head that reads complete sequences.
    """
    for module in model.modules() if context is not None else ():
        if getattr(module, "needs_complete_sequences", False):
            raise ValueError(
                "under sequence parallelism a rank holds a part of a sequence, got a "
                f"{type(module).__name__}, whose head reads complete ones; train it data-parallel, with a "
                "sequence-parallel size of 1"
            )
    layers = [module for module in model.modules() if hasattr(module, "sequence_parallel_context")]
    if not layers:
        raise ValueError(
            f"sequence parallelism needs layers with a sequence_parallel_context, {type(model).__name__} has none; "
            "use a LinearLlama3 model"
        )
    if context is not None:
        context.resolve_layout(model)
    for layer in layers:
        layer.sequence_parallel_context = context  # type: ignore[assignment]
