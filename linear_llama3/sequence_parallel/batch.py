"""The normal form of a batch, in which it can be cut into shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.cross_entropy import IGNORE_INDEX
from ..ops.documents import DOCUMENT_KEYS, check_mask, document_edges, restarting_positions

CUT = ("input_ids", "inputs_embeds", "labels", "shift_labels", "position_ids")  # entries with a value per token
READ = (*DOCUMENT_KEYS, "attention_mask", "max_length_q", "max_length_k")  # entries that describe complete rows


@dataclass(frozen=True, slots=True)
class CompleteBatch:
    """A batch that every rank holds completely."""

    sequences: dict[str, Tensor]  # `[B, T, ...]`: inputs, targets and positions; packed rows joined to a batch of 1
    edges: Tensor | None  # int32 `[N + 1]` of packed documents, the padding at the end included
    uncut: dict[str, Any]  # entries without a value per token


def normalize_batch(batch: Mapping[str, Any], *, causal: bool, padded: Callable[[int], int]) -> CompleteBatch:
    """Check a batch as described in `SequenceParallelContext.shard_batch` and bring it into normal form.

    Args:
        causal: whether attention is causal. If not, padding becomes separate documents.
        padded: the length to which the layout pads a length. Only `position_ids` are padded here.
    """
    names = [name for name in CUT[:2] if batch.get(name) is not None]
    if len(names) != 1:
        raise ValueError(f"a batch needs input_ids or inputs_embeds, one of them, got {sorted(batch)}")
    tokens, mask, positions = batch[names[0]], batch.get("attention_mask"), batch.get("position_ids")
    _check_shapes(names[0], tokens, batch)
    rows, length = tokens.shape[:2]
    uncut = {name: x for name, x in batch.items() if name not in (*CUT, *READ)}
    _check_uncut(uncut, rows, length)
    check_mask(mask)
    _check_padding(mask)

    edges = document_edges(batch, mask, batch=rows, length=length)
    incomplete = padded(length) != length or (mask is not None and not mask.all())
    if edges is None and not causal and incomplete:
        attended = torch.ones(rows, length, device=tokens.device) if mask is None else mask
        edges, positions = _pack_padding(attended), None
    if positions is None and edges is not None:
        positions = restarting_positions(edges, batch=rows, length=length)
    elif positions is None:
        positions = torch.arange(length, device=tokens.device).unsqueeze(0)

    sequences = {names[0]: tokens, **_targets(batch), "position_ids": positions.expand(rows, length)}
    if edges is not None and rows > 1:
        sequences = {name: x.flatten(0, 1).unsqueeze(0) for name, x in sequences.items()}
    positions = sequences["position_ids"]
    total = positions.shape[1]
    padding = padded(total) - total
    tail = torch.arange(padding, device=positions.device).expand(len(positions), -1)
    if edges is None:  # positions continue in the padding
        tail = positions[:, -1:] + 1 + tail
    elif padding:  # the padding forms a separate document
        edges = torch.cat([edges, edges.new_tensor([total + padding])])
    sequences["position_ids"] = torch.cat([positions, tail], dim=1)
    return CompleteBatch(sequences, edges, uncut)


def _targets(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """`labels` as they are (transformers asks for them) and shifted to the token that predicts them."""
    labels, shifted = batch.get("labels"), batch.get("shift_labels")
    if shifted is None and labels is not None:
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    targets = {"labels": labels, "shift_labels": shifted}
    return {name: x for name, x in targets.items() if x is not None}


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
    if mask is not None and (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any():
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
