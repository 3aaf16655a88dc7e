"""What a plan is: micro-batches of groups of devices, each with whole sequences of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The devices that are planned together, all alike."""

    devices: int
    memory: float  # bytes of each device that a run may fill

    def __post_init__(self) -> None:
        for name in ("devices", "memory"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of a cluster must be positive, got {getattr(self, name)}")

    def __str__(self) -> str:
        return f"{self.devices} devices with {bytes_text(self.memory)} each"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Neighbouring ranks [first_rank, first_rank + degree) that share sequences, packed one behind the other.

    The degree is a power of two and first_rank a multiple of it: there are no more than devices - 1 such groups of
    two ranks and more (`aligned_groups`), and one within a node never reaches over its edge.
    """

    degree: int
    first_rank: int
    sequences: tuple[int, ...]  # positions in the lengths that were planned, the longest first
    tokens: int
    seconds: float  # predicted

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.degree)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Groups that cover all devices, the largest first; all start together and wait for the slowest."""

    groups: tuple[Group, ...]

    @property
    def seconds(self) -> float:
        return max(group.seconds for group in self.groups)

    def __str__(self) -> str:
        """As in the FlexSP paper: <32, 16, 8 x 2>."""
        counts = Counter(group.degree for group in self.groups)
        return f"<{', '.join(f'{d} x {n}' if n > 1 else str(d) for d, n in counts.items())}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One optimiser step: every rank runs as many micro-batches, in this order."""

    devices: int
    micro_batches: tuple[MicroBatch, ...]

    @property
    def seconds(self) -> float:
        return sum(micro_batch.seconds for micro_batch in self.micro_batches)

    def for_rank(self, rank: int) -> tuple[Group, ...]:
        """The group that `rank` belongs to, in every micro-batch."""
        return tuple(next(g for g in batch.groups if rank in g.ranks) for batch in self.micro_batches)

    def __str__(self) -> str:
        return " ".join(map(str, self.micro_batches))


def aligned_groups(devices: int) -> list[tuple[int, int]]:
    """(degree, first_rank) of every group of two ranks and more that a plan can contain, largest first.

    What has to be created once: every rank is in at most log2(devices) of them.
    """
    degrees = [1 << bit for bit in range(devices.bit_length() - 1, 0, -1)]
    return [(degree, first) for degree in degrees for first in range(0, devices - degree + 1, degree)]


def fewest_groups(degrees: Iterable[int], devices: int) -> int:
    """That groups of these degrees can cover all devices with: as many sequences has a micro-batch at least."""
    rest, count = devices, 0
    for degree in sorted(degrees, reverse=True):
        count, rest = count + rest // degree, rest % degree
    return count


def bytes_text(size: float) -> str:
    """For messages: 24.4 KiB, 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
