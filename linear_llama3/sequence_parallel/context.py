"""The context in which a model runs on a shard of every sequence: the group, the strategies, the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.cross_entropy import IGNORE_INDEX
from ..ops.documents import DOCUMENT_KEYS, check_mask, document_edges, restarting_positions
from .collectives import check_group, group_rank, world_size
from .layout import check_length, get_layout, shard
from .linear.attention import PendingLinearAttention, get_linear_strategy, linear_attention, start_linear_attention
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
        """Name of the layout. Enabling the first model resolves "auto"; sharding or attention before that resolves it to
        "contiguous". It never changes afterwards, so shards and attention always have the same layout."""
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
        ranks, total = self.world_size, tokens * self.world_size
        check_length(tokens, ranks, self._resolved_layout(), total)
        spans = get_layout(self._resolved_layout(), ranks).spans(self.rank, ranks, total, total)
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

    def linear_attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """`sequence_parallel.linear_attention` with this context's group, strategy and layout."""
        layout = self._resolved_layout()
        return linear_attention(q, k, v, group=self.group, strategy=self.config.linear, layout=layout, **options)

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
        rest = dict(batch)
        inputs = {name: rest.pop(name) for name in ("input_ids", "inputs_embeds") if rest.get(name) is not None}
        if len(inputs) != 1:
            raise ValueError(f"a batch needs input_ids or inputs_embeds, one of them, got {sorted(batch)}")
        [(name, tokens)] = inputs.items()
        _check_shapes(name, tokens, rest)
        rows, length = tokens.shape[:2]
        mask, positions = rest.pop("attention_mask", None), rest.pop("position_ids", None)
        check_mask(mask)
        _check_padding(mask)
        edges = document_edges({**rest, "position_ids": positions}, mask, batch=rows, length=length)
        for name in (*DOCUMENT_KEYS, "max_length_q", "max_length_k"):
            rest.pop(name, None)  # these describe complete rows
        ragged = get_layout(self._resolved_layout(), self.world_size).padded(length, self.world_size) != length
        if edges is None and not self.causal and (ragged or (mask is not None and not mask.all())):
            attended = torch.ones(rows, length, device=tokens.device) if mask is None else mask
            edges, positions = _pack_padding(attended), None
        if positions is None and edges is not None:
            positions = restarting_positions(edges, batch=rows, length=length)
        elif positions is None:
            positions = torch.arange(length, device=tokens.device).unsqueeze(0)
        sequences = {**inputs, **_targets(rest), "position_ids": positions.expand(rows, length)}
        _check_uncut(rest, rows, length)

        if edges is not None and rows > 1:
            sequences = {name: x.flatten(0, 1).unsqueeze(0) for name, x in sequences.items()}
        total = sequences["position_ids"].shape[1]
        padding = get_layout(self._resolved_layout(), self.world_size).padded(total, self.world_size) - total
        sequences["position_ids"] = _extend_positions(sequences["position_ids"], padding, edges is not None)
        local = {name: self._cut(name, x) for name, x in sequences.items()}
        if edges is not None:
            if padding:  # a document of its own
                edges = torch.cat([edges, edges.new_tensor([total + padding])])
            local["cu_seq_lens_q"] = local["cu_seq_lens_k"] = edges
        return {**rest, **local}

    def _cut(self, name: str, x: Tensor) -> Tensor:
        padding = IGNORE_INDEX if name in ("labels", "shift_labels") else 0
        return shard(x, group=self.group, dim=1, layout=self._resolved_layout(), padding=padding).contiguous()


def _no_context() -> None:
    """Stand in for a context when a pickle is loaded."""


def enable_sequence_parallel(model: nn.Module, context: SequenceParallelContext | None) -> None:
    """Give `context` to every attention layer of `model`; None makes them plain attention again.

    Raises:
        ValueError: the model has no layer that supports sequence parallelism, or a head that reads complete sequences.
    """
    for module in model.modules() if context is not None else ():
        if getattr(module, "needs_whole_sequences", False):
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


def _check_shapes(name: str, tokens: Tensor, rest: Mapping[str, Any]) -> None:
    """Raise ValueError if a per-token entry differs in shape from the tokens."""
    embedded = name == "inputs_embeds"
    if tokens.dim() != 2 + embedded:
        raise ValueError(
            f"{name} must be {'[B, T, D]' if embedded else '[B, T]'}, got shape {tuple(tokens.shape)}; "
            "a single sequence is a batch of 1"
        )
    if tokens.numel() == 0:
        raise ValueError(f"a sequence needs at least one token, got a batch of shape {tuple(tokens.shape)}")
    rows, length = tokens.shape[:2]
    for key in ("labels", "shift_labels", "attention_mask", "position_ids"):
        x = rest.get(key)
        if x is None or x.shape == (rows, length) or (key == "position_ids" and x.shape == (1, length)):
            continue
        documents = ", and tell documents by cu_seq_lens_q or restarting position_ids"
        raise ValueError(
            f"{key} must be [B, T] = {(rows, length)} like {name}, got shape {tuple(x.shape)}; collate it with "
            f"the tokens{documents if key == 'attention_mask' else ''}"
        )


def _check_padding(mask: Tensor | None) -> None:
    """Raise ValueError for padding before a token: causal attention ignores padding only on the right."""
    if mask is None:
        return
    mask = mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(
            "sequence parallelism accepts padding on the right only, got an attention_mask with padding before a "
            "token; set tokenizer.padding_side = 'right' or pack the documents"
        )


def _pack_padding(mask: Tensor) -> Tensor:
    """Return edges `[N + 1]` in the B * T tokens: a row's attended tokens are one document, its padding another."""
    rows, length = mask.shape
    starts = torch.arange(rows, device=mask.device) * length
    ends = starts + (mask != 0).sum(1)
    return torch.cat([starts, ends, ends.new_tensor([rows * length])]).unique().to(torch.int32)


def _check_uncut(rest: Mapping[str, Any], rows: int, length: int) -> None:
    """Raise ValueError for other per-token entries, which would reach the model uncut."""
    for name, x in rest.items():
        if isinstance(x, Tensor) and x.shape[:2] == (rows, length):
            raise ValueError(
                "shard_batch cuts no other tensors [B, T, ...] than tokens, labels, positions and masks, got "
                f"{name!r} of shape {tuple(x.shape)}; take it out of the batch, and cut it with shard where needed"
            )


def _targets(rest: dict[str, Any]) -> dict[str, Tensor]:
    """`labels` as they are (transformers asks for them) and shifted to the token that predicts them."""
    labels, shifted = rest.pop("labels", None), rest.pop("shift_labels", None)
    if shifted is None and labels is not None:
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    targets = {"labels": labels, "shift_labels": shifted}
    return {name: x for name, x in targets.items() if x is not None}


def _extend_positions(positions: Tensor, padding: int, packed: bool) -> Tensor:
    """Positions of the padding: they continue or, where documents are packed, restart at 0."""
    start = torch.zeros_like(positions[:, -1:]) if packed else positions[:, -1:] + 1
    return torch.cat([positions, start + torch.arange(padding, device=positions.device)], dim=1)
