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

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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


class Output(NamedTuple):
    """The result of a forward pass."""

    out: Tensor  # [B, T, H_q, D_v]
    final_states: Tensor | None  # [B or N, H_kv, D_k, D_v], after every document
    residuals: tuple[Tensor | None, ...]  # what the backward pass needs in addition to the inputs


@dataclass(slots=True)
class Gradients:
    """Gradients of the inputs, each in the shape and dtype of its input; None where nobody asked."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None  # [B or N, H_kv, D_k, D_v] in the working precision


class ForwardPass(Protocol):
    """Made of k, v, log_decay and the documents, before there are queries."""

    def summary(self) -> Tensor:
        """States `[closing, B, H_kv, D_k, D_v]`, from zero."""

    def intra_chunk(self, q: Tensor, scale: float) -> Any:
        """Whatever needs no state of earlier tokens, for `output`."""

    def output(self, q: Tensor, scale: float, entering: Tensor | None, intra: Any = None) -> Output:
        """The outputs of queries `[B, T, H_q, D_k]`; `entering` `[opening, B, H_kv, D_k, D_v]`, None for zeros."""


class BackwardPass(Protocol):
    """Made of the inputs, their documents, the residuals and d_out."""

    def summary(self) -> Tensor:
        """Gradients `[opening, B, H_kv, D_k, D_v]` of the states that enter, from this device's outputs alone."""

    def intra_chunk(self) -> Any:
        """Whatever needs no gradient of a later state, for `gradients`."""

    def gradients(self, d_leaving: Tensor | None, intra: Any = None, *, initial_state: bool = False) -> Gradients:
        """The gradients, given those of the states that leave, `[closing, B, H_kv, D_k, D_v]` or None for zeros."""
