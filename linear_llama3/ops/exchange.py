"""Other devices, as an op on one device sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Link(NamedTuple):
    """Tokens of this device that follow one another in the sequence: the documents [first, stop) of its stream."""

    first: int
    stop: int  # equal to `first` where the link holds no token
    left_open: bool  # its first document began earlier in the sequence


class Exchange(Protocol):
    """The exclusive affine scan of (state, decay) over the links of all devices, seen from one of them."""

    @property
    def links(self) -> Sequence[Link]:
        """Those of this device, L of them."""

    def start(self, summarize: Callable[[], tuple[Tensor, Tensor]], *, reverse: bool) -> Callable[[], Tensor]:
        """Starts sending `summarize()`, the states `[L, B, H, D_k, D_v]` and decay factors `[L, B, H, D_k]` of this
        device's links; the result waits for the states `[L, B, H, D_k, D_v]` that enter them from the earlier
        (reverse: later) links."""
