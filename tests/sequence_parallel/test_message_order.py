"""Messages between pairs of ranks, if every rank had to finish one batch before it starts the next.

gloo takes them in any order; NCCL runs them one after another. The batches of a real run are recorded and played
back under that rule: a batch ends once every peer has started the batch with its counterpart.
"""

from __future__ import annotations

from collections import defaultdict
from unittest.mock import patch

import torch.distributed as dist

from linear_llama3.sequence_parallel import LAYOUTS, costs
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed
from tests.sequence_parallel import test_linear, test_softmax

Batch = list[tuple[bool, int]]  # (whether it is a send, the peer) of every message
LINEAR = test_linear.Case(tokens=64, gate="channel", strength=0.1, documents=(0, 3, 40, 64))
SOFTMAX = [
    test_softmax.Case(tokens=64),
    test_softmax.Case(tokens=64, causal=False),
    test_softmax.Case(tokens=64, documents=(0, 30, 40, 64)),
    test_softmax.Case(tokens=64, window=9),
]


@patch.object(costs, "LATENCY_BYTES", 1)  # a block for every row of the state
def record(strategy: str, layout: str) -> list[list[Batch]]:
    """The batches of this rank, of every case."""
    linear, cases = strategy in test_linear.LINEAR_STRATEGIES, []
    for case in [LINEAR] if linear else SOFTMAX:
        with patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as start:
            (test_linear if linear else test_softmax).sharded_run(case, strategy, layout)
        batches = [operations for (operations,), _ in start.call_args_list]
        cases.append([[(op.op is dist.isend, op.group_peer) for op in batch] for batch in batches])
    return cases


def stuck(batches: list[list[Batch]]) -> list[int]:
    """The ranks that never finish."""
    places = defaultdict(list)  # (source, target, whether it is the send) -> the batches with its messages, in order
    for rank, own in enumerate(batches):
        for index, batch in enumerate(own):
            for send, peer in batch:
                places[(rank, peer, True) if send else (peer, rank, False)].append(index)
    for (source, target, _), found in places.items():
        assert len(found) == len(places[source, target, True]) == len(places[source, target, False])

    started, moved = [0] * len(batches), True  # the batch that every rank is in
    while moved:
        moved = False
        for rank, own in enumerate(batches):
            if started[rank] < len(own) and all(
                started[peer] >= places[source, target, not send][n]
                for send, peer, source, target, n in messages(own, started[rank], rank)
            ):
                started[rank] += 1
                moved = True
    return [rank for rank, own in enumerate(batches) if started[rank] < len(own)]


def messages(own: list[Batch], index: int, rank: int) -> list[tuple[bool, int, int, int, int]]:
    """The messages of a batch, each with its number among those of its pair of ranks."""
    counts: dict[tuple[bool, int], int] = defaultdict(int)
    for batch in own[:index]:
        for message in batch:
            counts[message] += 1
    found = []
    for send, peer in own[index]:
        source, target = (rank, peer) if send else (peer, rank)
        found.append((send, peer, source, target, counts[send, peer]))
        counts[send, peer] += 1
    return found


@slow_unless(
    lambda world_size, strategy, layout: world_size == 3,
    world_size=(2, 3, 4, 8), strategy=("lasp1", "all_scan", "ring", "token_ring", "rsa"), layout=LAYOUTS,
)  # fmt: skip
def test_no_rank_waits_for_ever(world_size: int, strategy: str, layout: str) -> None:
    by_rank = run_distributed(record, world_size, strategy, layout)
    for case in zip(*by_rank, strict=True):
        assert sum(map(len, case)) >= world_size - 1
        assert stuck(list(case)) == []


def test_playing_back_finds_a_deadlock() -> None:
    send_first = [[[(True, 1)], [(False, 1)]], [[(True, 0)], [(False, 0)]]]
    together = [[[(True, 1), (False, 1)]], [[(True, 0), (False, 0)]]]
    assert stuck(send_first) == [0, 1]
    assert stuck(together) == []
