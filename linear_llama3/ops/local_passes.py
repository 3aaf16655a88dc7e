"""The steps in which one device computes its share of linear attention.

A caller may exchange states with other devices between the steps; nothing here communicates. In the forward pass,

    summary()       the state that each closing document accumulates from zero, to be sent,
    intra_chunk()   what needs no state of earlier tokens, while states travel,
    output()        the outputs, given the states that enter the opening documents.

The backward pass mirrors it: `summary` gives the gradients of the states that enter the opening documents, as far as
they come from this device's outputs, and `gradients` receives those of the states that leave the closing documents.
Two implementations: `chunked.py` in PyTorch and `triton/passes.py` for NVIDIA GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Documents = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class LocalDocuments:
    """The documents of one device's tokens, and those that continue elsewhere."""

    boundaries: tuple[int, ...]  # local edges (0, ..., T), N + 1 of them; (0,) without tokens
    opening: Documents  # the document of each state that enters; None: it enters no document
    closing: Documents  # the document of each state that leaves

    @classmethod
    def complete(cls, boundaries: tuple[int, ...]) -> LocalDocuments:
        """Documents that lie on one device: each has an initial and a final state."""
        every = tuple(range(len(boundaries) - 1))
        return cls(boundaries, every, every)


def per_document(states: Tensor | None, *, batch: int) -> Tensor | None:
    """`[B or N, H, D_k, D_v]` as `[N, B, H, D_k, D_v]`."""
    return None if states is None else states.unflatten(0, (-1, batch))


Residuals = Sequence[Tensor | None]
"""What the backward pass needs in addition to the inputs: the states that entered, and `[B, n, H_kv, D_k, D_v]` those
at the left edges of blocks or segments. An implementation leaves out what it does not need."""


class Output(NamedTuple):
    """The result of a forward pass."""

    out: Tensor  # [B, T, H_q, D_v]
    final_states: Tensor | None  # [B or N, H_kv, D_k, D_v], after every document, if asked for
    residuals: Residuals


@dataclass(slots=True)
class Gradients:
    """Gradients of the inputs, each in the shape and dtype of its input; None where nobody asked."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None = None  # [B or N, H_kv, D_k, D_v] in the working precision


class ForwardPass(Protocol):
    """Made before there are queries."""

    def __init__(
        self, k: Tensor, v: Tensor, log_decay: Tensor | None, documents: LocalDocuments, *, out_dtype: torch.dtype
    ) -> None: ...

    def summary(self) -> Tensor:
        """States `[closing, B, H_kv, D_k, D_v]`, from zero."""

    def intra_chunk(self, q: Tensor, scale: float) -> Any:
        """Whatever needs no state of earlier tokens, for `output`."""

    def output(
        self, q: Tensor, scale: float, entering: Tensor | None, intra: Any = None, *, final_states: bool = False
    ) -> Output:
        """The outputs of queries `[B, T, H_q, D_k]`; `entering` `[opening, B, H_kv, D_k, D_v]`, None for zeros."""


class BackwardPass(Protocol):
    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, documents: LocalDocuments,
        residuals: Residuals, d_out: Tensor, scale: float, *, decay_learns: bool,
    ) -> None: ...  # fmt: skip

    def summary(self) -> Tensor:
        """Gradients `[opening, B, H_kv, D_k, D_v]` of the states that enter, from this device's outputs alone."""

    def intra_chunk(self) -> Any:
        """Whatever needs no gradient of a later state, for `gradients`."""

    def gradients(self, d_leaving: Tensor | None, intra: Any = None, *, initial_state: bool = False) -> Gradients:
        """The gradients, given those of the states that leave, `[closing, B, H_kv, D_k, D_v]` or None for zeros."""
