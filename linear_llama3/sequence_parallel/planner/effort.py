"""How much trouble a plan may take: counted, not timed, so that every rank stops searching at the same place."""

from __future__ import annotations

SECONDS = 0.5  # of an ordinary core, for up to 64 devices; for more in proportion
DEVICES = 64


class Effort:
    """What is left, in seconds as they are estimated from the sizes of arrays."""

    def __init__(self, left: float, lender: Effort | None = None) -> None:
        self.left, self.lender = left, lender

    @classmethod
    def of_step(cls, devices: int) -> Effort:
        return cls(SECONDS * max(devices, DEVICES) / DEVICES)

    def lend(self, share: float) -> Effort:
        """A part of what is left; what is not spent of it stays."""
        return Effort(max(self.left, 0.0) * share, self)

    def spend(self, seconds: float) -> None:
        self.left -= seconds
        if self.lender is not None:
            self.lender.spend(seconds)

    def __bool__(self) -> bool:
        return bool(self.left > 0)
