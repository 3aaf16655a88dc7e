"""No message is superfluous: without any one of them the outputs or gradients of some rank are others."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import torch.distributed as dist

from linear_llama3.sequence_parallel import LAYOUTS, costs
from linear_llama3.sequence_parallel.collectives import Pending, Transfer
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed
from tests.sequence_parallel import test_linear, test_softmax

LINEAR = test_linear.Case(tokens=24, gate="channel", strength=0.1, groups=2)
SOFTMAX = test_softmax.Case(tokens=24, groups=2, heads=3)
# without a mask: with it, keys of later ranks only pass by in RSA, and late parts of a gather go unread
BOTH_WAYS = test_softmax.Case(tokens=24, groups=2, heads=3, causal=False)


def results(strategy: str, layout: str) -> list[np.ndarray]:
    if strategy in test_linear.LINEAR_STRATEGIES:
        out, gradients = test_linear.sharded_run(LINEAR, strategy, layout)
        return [out, *gradients.values()]
    causal = strategy in ("ring", "token_ring")
    return test_softmax.sharded_run(SOFTMAX if causal else BOTH_WAYS, strategy, layout)


class Losing:
    """Counts what this rank receives, and loses message `number` (replaces it by zeros)."""

    def __init__(self, number: int | None) -> None:
        self.number, self.count = number, 0

    def __enter__(self) -> Losing:
        transfer_wait, pending_wait, losing = Transfer.wait, Pending.wait, self

        def wait_for_transfer(transfer: Transfer) -> Any:
            fresh = bool(transfer.works)
            received = transfer_wait(transfer)
            for x in received if fresh else ():
                if x.numel():
                    losing.lose(x)
            return received

        def wait_for_collective(pending: Pending) -> Any:
            result = pending_wait(pending)
            losing.lose(result)
            return result

        waits = ((Transfer, wait_for_transfer), (Pending, wait_for_collective))
        self.patches = [patch.object(kind, "wait", wait) for kind, wait in waits]
        for method in self.patches:
            method.start()
        return self

    def lose(self, x: Any) -> None:
        if self.count == self.number:
            x.zero_()
        self.count += 1

    def __exit__(self, *_: object) -> None:
        for method in self.patches:
            method.stop()


@patch.object(costs, "LATENCY_BYTES", 1)  # a block for every row of the state
def lose_each(strategy: str, layout: str) -> list[tuple[int, int, float]]:
    """(rank, message, largest difference on any rank) for every message that any rank receives."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with Losing(None) as counter:
        expected = results(strategy, layout)
    counts: list[Any] = [None] * ranks
    dist.all_gather_object(counts, counter.count)
    found = []
    for loser in range(ranks):
        for number in range(counts[loser]):
            with Losing(number if rank == loser else None):
                got = results(strategy, layout)
            differences = [np.nan_to_num(np.abs(a - b), nan=1.0).max() for a, b in zip(got, expected, strict=True)]
            everyone: list[Any] = [None] * ranks
            dist.all_gather_object(everyone, max(differences))
            found.append((loser, number, max(everyone)))
    return found


def read_by_nobody(strategy: str, rank: int, number: int) -> bool:
    """The first rank has nothing before it, the last nothing behind it: what enters there is zero."""
    forward, backward = {"lasp2": (0, 1), "all_to_all": (1, 3)}.get(strategy, (-1, -1))
    return (rank, number) in ((0, forward), (2, backward))


@slow_unless(
    lambda strategy, layout: layout == "zigzag" and strategy in ("lasp1", "lasp2", "all_to_all", "lasp2h", "ring"),
    strategy=[*test_linear.LINEAR_STRATEGIES, *test_softmax.SOFTMAX_STRATEGIES], layout=LAYOUTS,
)  # fmt: skip
def test_every_message_counts(strategy: str, layout: str) -> None:
    found = run_distributed(lose_each, 3, strategy, layout)[0]
    assert len(found) >= 4
    for rank, number, difference in found:
        if layout == "contiguous" and read_by_nobody(strategy, rank, number):
            continue
        assert difference > 1e-6, f"message {number} that rank {rank} receives changes nothing"
