"""What a model needs to know to run on a part of every sequence: the group, the strategies, the cut of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .collectives import group_rank, world_size
from .layout import get_layout, shard
from .linear.attention import get_linear_strategy, linear_attention
from .softmax.attention import get_softmax_strategy, softmax_attention

IGNORE_INDEX = -100  # transformers' label of a token without loss


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceParallelConfig:
    """Names of the strategies for both kinds of layers, and of the layout ("auto": the best there is for both)."""

    linear: str = "lasp2"
    softmax: str = "lasp2h"
    layout: str = "auto"

    def __post_init__(self) -> None:
        get_linear_strategy(self.linear)
        get_softmax_strategy(self.softmax)
        if self.layout != "auto":
            get_layout(self.layout)


class SequenceParallelContext:
    """One sequence-parallel group: its ranks hold the parts of the same sequences.

    Args:
        group: the ranks, in the order of the sequence; None is a group of one.
        config: strategies and layout.
    """

    def __init__(self, group: dist.ProcessGroup | None, config: SequenceParallelConfig | None = None) -> None:
        self.group = group
        self.config = config or SequenceParallelConfig()
        self.layout = "contiguous" if self.config.layout == "auto" else self.config.layout

    @property
    def rank(self) -> int:
        return group_rank(self.group)

    @property
    def world_size(self) -> int:
        return world_size(self.group)

    def linear_attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """`sequence_parallel.linear_attention` with this context's group, strategy and layout."""
        return linear_attention(
            q, k, v, group=self.group, strategy=self.config.linear, layout=self.layout, **options
        )

    def softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """`sequence_parallel.softmax_attention` with this context's group, strategy and layout."""
        return softmax_attention(
            q, k, v, group=self.group, strategy=self.config.softmax, layout=self.layout, **options
        )

    def shard_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch that every rank of the group holds whole.

        Labels are shifted before the cut, so that no target is lost at an edge; positions stay global; rows that
        pack documents become one row (batch of 1), with the edges of all documents as `cu_seq_lens_q/k`. The end
        is padded to the same number of tokens on every rank, without labels.

        Args:
            batch: `input_ids` `[B, T]` or `inputs_embeds` `[B, T, D]`, and any of `labels`, `shift_labels`,
                `position_ids`, `attention_mask` `[B, T]` (right padding only), `cu_seq_lens_q/k` `[N + 1]`.
                Entries that are not cut (numbers, `num_items_in_batch`) pass through.

        Returns:
            The same keys, cut, without `attention_mask`, and with `position_ids` and, where there are labels,
            `shift_labels`.
        """
        rest = dict(batch)
        inputs = {
            name: rest.pop(name) for name in ("input_ids", "inputs_embeds") if rest.get(name) is not None
        }
        if len(inputs) != 1:
            raise ValueError(f"a batch needs input_ids or inputs_embeds, one of them, got {sorted(batch)}")
        tokens = next(iter(inputs.values()))
        rows, length = tokens.shape[:2]
        if tokens.numel() == 0:
            raise ValueError(
                f"a sequence needs at least one token, got a batch of shape {tuple(tokens.shape)}"
            )
        _check_padding(rest.pop("attention_mask", None))
        sequences = {**inputs, **_targets(rest)}
        given = rest.pop("position_ids", None)
        positions = torch.arange(length, device=tokens.device) if given is None else given
        sequences["position_ids"] = (
            positions.expand(rows, length) if positions.shape[0] != rows else positions
        )

        edges = _document_edges(rest, sequences["position_ids"] if given is not None else None, rows, length)
        if edges is not None and rows > 1:
            sequences = {name: x.flatten(0, 1).unsqueeze(0) for name, x in sequences.items()}
        local = {name: self._cut(name, x) for name, x in sequences.items()}
        if edges is not None:
            edges = self._close_padding(edges).to(tokens.device)
            local["cu_seq_lens_q"] = local["cu_seq_lens_k"] = edges
        return {**rest, **local}

    def _cut(self, name: str, x: Tensor) -> Tensor:
        padding = IGNORE_INDEX if name in ("labels", "shift_labels") else 0
        return shard(x, group=self.group, dim=1, layout=self.layout, padding=padding).contiguous()

    def _close_padding(self, edges: Tensor) -> Tensor:
        """The padding is a document of its own."""
        padded = get_layout(self.layout).padded(int(edges[-1]), self.world_size)
        return edges if padded == edges[-1] else torch.cat([edges, edges.new_tensor([padded])])


def enable_sequence_parallel(model: nn.Module, context: SequenceParallelContext | None) -> None:
    """Hands `context` to every attention layer of `model`; None makes them plain attention again.

    Raises:
        ValueError: the model has no layer that knows sequence parallelism.
    """
    layers = [module for module in model.modules() if hasattr(module, "sequence_parallel_context")]
    if not layers:
        raise ValueError(
            f"sequence parallelism needs layers with a sequence_parallel_context, {type(model).__name__} has none; "
            "use a LinearLlama3 model"
        )
    for layer in layers:
        layer.sequence_parallel_context = context  # type: ignore[assignment]


def _check_padding(mask: Tensor | None) -> None:
    """Causal attention never looks at padding on the right; anywhere else it would have to be masked."""
    if mask is None:
        return
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be [B, T] under sequence parallelism, got shape {tuple(mask.shape)}; "
            "tell documents by cu_seq_lens_q or restarting position_ids"
        )
    mask = mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(
            "sequence parallelism takes padding on the right only, got an attention_mask with padding before a "
            "token; set tokenizer.padding_side = 'right' or pack the documents"
        )


def _targets(rest: dict[str, Any]) -> dict[str, Tensor]:
    """`labels` as they are (transformers asks for them) and shifted to the token that predicts them."""
    labels, shifted = rest.pop("labels", None), rest.pop("shift_labels", None)
    if shifted is None and labels is not None:
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    targets = {"labels": labels, "shift_labels": shifted}
    return {name: x for name, x in targets.items() if x is not None}


def _document_edges(rest: dict[str, Any], positions: Tensor | None, rows: int, length: int) -> Tensor | None:
    """Edges of all documents in the rows laid end to end, int32 `[N + 1]`; None where nothing is packed."""
    given = rest.pop("cu_seq_lens_q", None)
    other = rest.pop("cu_seq_lens_k", None)
    for name in ("max_length_q", "max_length_k", "seq_idx"):
        rest.pop(name, None)  # describe the whole rows; nothing here needs them
    given = other if given is None else given
    if given is not None:
        if int(given[-1]) != rows * length:
            raise ValueError(
                f"cu_seq_lens_q must end at the number of tokens, {rows} x {length}, got {int(given[-1])}"
            )
        return given.to(torch.int32)
    if positions is None:
        return None
    starts = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=True)
    if int(starts.sum()) == rows:
        return None  # every row is one document
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=rows * length).to(torch.int32)
