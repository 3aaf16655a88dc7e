"""The cost model of the strategies, and the choice that `strategy="auto"` makes from it.

Bytes are what a rank sends in one layer, exact for causal attention of inputs up to float32 (float64 keeps states,
gradients and partial results in float64) where the length divides into equal chunks: the mean over the ranks for the
forward and for the backward pass. The time of a direction is

    messages one after another * latency + bytes of the busiest rank and direction of its link / bandwidth

with the figures of the slowest link between the ranks (`LINKS`; orders of magnitude, not measurements). Computation
that hides a transfer is left out. "auto" takes the least time forward + backward, of these:

- linear layers: all four. Few ranks and small states favor LASP-2 (one message), many ranks the scan by
  all-to-all (bytes do not grow with W), slow links and large states All-Scan or, between two ranks, LASP-1.
- softmax layers: Ulysses where heads divide; LASP-2H unless what it gathers exceeds `GATHERED_LIMIT`; Ring;
  TokenRing inside a node for H_q <= 2 H_kv, the only case in which its queries weigh less than K and V. RSA never:
  its scores take memory of C * T.

The planner of adaptive groups (`planner/`) uses the same formulas with the measured speed of each link.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from .collectives import number_of_nodes
from .sequence_shard import SequenceShard

logger = logging.getLogger(__name__)

GATHERED_LIMIT = 8 * 2**30  # bytes of gathered K and V, and their gradients, that LASP-2H may hold in a layer
LATENCY_BYTES = 64 * 1024  # latency times bandwidth: what a link carries while one message of All-Scan starts
FLOAT32 = 4


class LinkSpeed(NamedTuple):
    """The speed of one rank's connection, one direction."""

    latency: float  # seconds
    bandwidth: float  # bytes a second

    def seconds(self, messages: float, size: float) -> float:
        """The time of messages one after another, of `size` bytes in total."""
        return messages * self.latency + size / self.bandwidth


LINKS = {
    "gpus of one node": LinkSpeed(10e-6, 200e9),
    "nodes with gpus": LinkSpeed(25e-6, 40e9),
    "cpus": LinkSpeed(150e-6, 1e9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """One attention layer on one rank."""

    batch: int
    tokens: int  # C, of this rank
    q_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    element: int  # bytes of an element of q, k, v
    ranks: int
    nodes: int = 1  # over which the ranks are spread
    chunks_per_rank: int = 1  # of the layout: 1 contiguous, 2 zigzag
    decays: bool = False  # linear layers: a decay travels with the state
    recomputed: bool = False  # under gradient checkpointing: LASP-2H gathers once more, RSA goes round its rings again
    gpu: bool = True

    @property
    def link(self) -> str:
        if not self.gpu:
            return "cpus"
        return "gpus of one node" if self.nodes == 1 else "nodes with gpus"


def sizes_of(
    q: Tensor, v: Tensor, shard: SequenceShard, group: dist.ProcessGroup, *, decays: bool = False,
    recomputed: bool = False,
) -> Sizes:  # fmt: skip
    """Sizes for the cost model from q `[B, n, H_q, D_k]` and v `[B, n, H_kv, D_v]`; the same on every rank."""
    return Sizes(
        batch=q.shape[0],
        tokens=shard.local,
        q_heads=q.shape[2],
        kv_heads=v.shape[2],
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        element=q.element_size(),
        ranks=shard.ranks,
        nodes=number_of_nodes(group, q.device),
        chunks_per_rank=shard.layout.chunks_per_rank,
        gpu=q.device.type != "cpu",
        decays=decays,
        recomputed=recomputed,
    )


class Cost(NamedTuple):
    """The cost of one layer; bytes that a rank sends are means."""

    forward: float
    backward: float
    forward_seconds: float  # by the model above
    backward_seconds: float

    @property
    def seconds(self) -> float:
        """The sum of both directions."""
        return self.forward_seconds + self.backward_seconds


def linear_costs(sizes: Sizes, link: LinkSpeed | None = None) -> dict[str, Cost]:
    """Costs by strategy. A state is `[B, H_kv, D_k, D_v]` in float32; every chunk of the layout is a link of the chain.

    Args:
        link: between the ranks; default: that of `LINKS` which the sizes name.
    """
    s, ranks, links, link = sizes, sizes.ranks, sizes.chunks_per_rank, link or LINKS[sizes.link]
    bare = s.batch * s.kv_heads * s.key_dim * s.value_dim * FLOAT32
    state = bare + s.batch * s.kv_heads * s.key_dim * FLOAT32 * s.decays
    hops = links * (ranks - 1)  # between ranks: what folds from chunk to chunk on a rank is free
    blocks = number_of_blocks(bare, rows=s.key_dim, hops=links * ranks - 1)
    block_hops = hops - 1 + blocks
    both_ways = (state + bare) * hops / ranks
    one_pass = {
        "lasp1": (hops * bare / ranks, link.seconds(hops, hops * bare)),
        "lasp2": (hops * state, link.seconds(1, hops * state)),
        "all_scan": (hops * bare / ranks, link.seconds(block_hops, block_hops * bare / blocks)),
        "all_to_all": (both_ways, link.seconds(2, both_ways)),
    }
    return {name: Cost(sent, sent, seconds, seconds) for name, (sent, seconds) in one_pass.items()}


def number_of_blocks(size: int, *, rows: int, hops: int) -> int:
    """K of All-Scan (`linear/all_scan.py`) for a state of `size` bytes with D_k = `rows`."""
    return max(1, min(rows, round(sqrt((hops - 1) * size / LATENCY_BYTES))))


def softmax_costs(sizes: Sizes, link: LinkSpeed | None = None) -> dict[str, Cost]:
    """Costs by strategy, without those that cannot be used. Gradients and partial results travel in float32.

    Args:
        link: as of `linear_costs`.
    """
    s, ranks, hops, link = sizes, sizes.ranks, sizes.ranks - 1, link or LINKS[sizes.link]
    rows = s.batch * s.tokens
    keys_values = hops * rows * s.kv_heads * (s.key_dim + s.value_dim)  # numbers that a rank sends of its K and V
    once, gradients, again = keys_values * s.element, keys_values * FLOAT32, int(s.recomputed)
    # Of the rows that go round a complete ring, the causal mask leaves half or, on the zigzag layout, three quarters;
    # but on the contiguous one the rank before the last forwards all of them.
    mean, busiest = (0.5, 1.0) if s.chunks_per_rank == 1 else (0.75, 0.75)
    ring_link = LinkSpeed(link.latency, link.bandwidth * mean / busiest)
    costs = {
        "lasp2h": _cost(link, (1, once), (1 + again, again * once + gradients)),
        "rsa": _cost(link, (2 * hops, once), (2 * hops * (1 + again) + 1, (1 + again) * once + gradients)),
        "ring": _cost(ring_link, (ranks, mean * once), (ranks, mean * (once + gradients))),
    }
    # TokenRing: queries one way, results the other
    query, result = rows * s.q_heads * s.key_dim, rows * s.q_heads * (s.value_dim + 1) * FLOAT32
    bundle = rows * s.q_heads * ((s.key_dim + s.value_dim) * s.element + 2 * FLOAT32)
    costs["token_ring"] = Cost(
        mean * hops * (query * s.element + result),
        mean * hops * (bundle + query * FLOAT32),
        link.seconds(ranks, busiest * hops * max(query * s.element, result)),
        link.seconds(ranks, busiest * hops * max(bundle, query * FLOAT32)),
    )
    if s.q_heads % ranks == 0 and (s.kv_heads % ranks == 0 or ranks % s.kv_heads == 0):
        heads = s.q_heads + max(s.kv_heads, ranks)
        moved = hops / ranks * rows * heads * (s.key_dim + s.value_dim) * s.element
        costs["ulysses"] = _cost(link, (2, moved), (2, moved))
    return costs


def _cost(link: LinkSpeed, forward: tuple[int, float], backward: tuple[int, float]) -> Cost:
    """The cost of two passes, each (messages one after another, bytes)."""
    return Cost(forward[1], backward[1], link.seconds(*forward), link.seconds(*backward))


@lru_cache(maxsize=256)  # and so one line in the log for every new choice
def choose_linear(sizes: Sizes, *, log: bool) -> str:
    """The strategy that `strategy="auto"` stands for in a linear layer."""
    return _cheapest("linear", sizes, linear_costs(sizes), {}, log)


@lru_cache(maxsize=256)
def choose_softmax(sizes: Sizes, *, log: bool) -> str:
    """The strategy that `strategy="auto"` stands for in a softmax layer."""
    costs = softmax_costs(sizes)
    return _cheapest("softmax", sizes, costs, _unsuitable(sizes, costs), log)


def _cheapest(kind: str, sizes: Sizes, costs: Mapping[str, Cost], left_out: Mapping[str, str], log: bool) -> str:
    best = min((name for name in costs if name not in left_out), key=lambda name: costs[name].seconds)
    if log:
        estimates = ", ".join(f"{name} {1e3 * cost.seconds:.3g} ms" for name, cost in costs.items())
        reasons = "".join(f"; not {name}: {reason}" for name, reason in left_out.items())
        logger.info(
            "%s layers use %s: estimates per layer, forward and backward, for %d ranks (%s): %s%s",
            kind, best, sizes.ranks, sizes.link, estimates, reasons,
        )  # fmt: skip
    return best


def _unsuitable(sizes: Sizes, costs: Mapping[str, Cost]) -> dict[str, str]:
    """Softmax strategies that "auto" rejects, with the reason."""
    s = sizes
    reasons = {"rsa": "its scores take C * T numbers a head"}
    gathered = s.batch * s.ranks * s.tokens * s.kv_heads * (s.key_dim + s.value_dim) * (s.element + FLOAT32)
    if gathered > GATHERED_LIMIT:
        reasons["lasp2h"] = f"it would gather {gathered / 2**30:.1f} GiB"
    if s.q_heads > 2 * s.kv_heads:
        reasons["token_ring"] = "H_q > 2 H_kv"
    elif s.nodes > 1:
        reasons["token_ring"] = "results take many links between nodes"
    return {name: reason for name, reason in reasons.items() if name in costs}
