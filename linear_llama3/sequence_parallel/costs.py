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

The planner of adaptive groups (`planner/`) reads the same formulas with measured link speeds, and without torch: at
run time this file imports none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from .sequence_shard import SequenceShard

logger = logging.getLogger(__name__)

GATHERED_LIMIT = 8 * 2**30  # bytes of gathered K and V, and their gradients, that LASP-2H may hold in a layer
LATENCY_BYTES = 64 * 1024  # latency times bandwidth: what a link carries while one message of All-Scan starts
FLOAT32 = 4


class LinkSpeed(NamedTuple):
    """The speed of one rank's connection, one direction."""

    latency: float  # seconds
    bandwidth: float  # bytes a second


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
    q: Tensor,
    v: Tensor,
    shard: SequenceShard,
    group: dist.ProcessGroup,
    *,
    decays: bool = False,
    recomputed: bool = False,
) -> Sizes:
    """Sizes for the cost model from q `[B, n, H_q, D_k]` and v `[B, n, H_kv, D_v]`; the same on every rank."""
    from .collectives import number_of_nodes

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
        decays=decays,
        recomputed=recomputed,
        gpu=q.device.type != "cpu",
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
    s, ranks, links = sizes, sizes.ranks, sizes.chunks_per_rank
    latency, bandwidth = link or LINKS[s.link]
    bare = s.batch * s.kv_heads * s.key_dim * s.value_dim * FLOAT32
    state = bare + s.batch * s.kv_heads * s.key_dim * FLOAT32 * s.decays
    hops = links * (ranks - 1)  # between ranks: what folds from chunk to chunk on a rank is free
    blocks = number_of_blocks(bare, rows=s.key_dim, hops=links * ranks - 1)
    both_ways = (state + bare) * links * (ranks - 1) / ranks
    return {
        "lasp1": _same_both_ways(hops * bare / ranks, hops * (latency + bare / bandwidth)),
        "lasp2": _same_both_ways((ranks - 1) * links * state, latency + (ranks - 1) * links * state / bandwidth),
        "all_scan": _same_both_ways(hops * bare / ranks, (hops - 1 + blocks) * (latency + bare / blocks / bandwidth)),
        "all_to_all": _same_both_ways(both_ways, 2 * latency + both_ways / bandwidth),
    }


def number_of_blocks(size: int, *, rows: int, hops: int) -> int:
    """K of All-Scan (`linear/all_scan.py`) for a state of `size` bytes with D_k = `rows`."""
    return max(1, min(rows, round(sqrt((hops - 1) * size / LATENCY_BYTES))))


def _same_both_ways(sent: float, seconds: float) -> Cost:
    return Cost(sent, sent, seconds, seconds)


def softmax_costs(sizes: Sizes, link: LinkSpeed | None = None) -> dict[str, Cost]:
    """Costs by strategy, without those that cannot be used. Gradients and partial results travel in float32.

    Args:
        link: as of `linear_costs`.
    """
    s, ranks = sizes, sizes.ranks
    latency, bandwidth = link = link or LINKS[s.link]
    rows, hops = s.batch * s.tokens, ranks - 1
    keys_values = rows * s.kv_heads * (s.key_dim + s.value_dim)  # elements of a rank's K and V
    # Of the rows that go round a complete ring, the causal mask leaves half or, on the zigzag layout, three quarters;
    # but on the contiguous one the rank before the last forwards all of them.
    mean, busiest = (0.5, 1.0) if s.chunks_per_rank == 1 else (0.75, 0.75)
    again = hops * keys_values * s.element * s.recomputed
    costs = {
        "lasp2h": _cost(
            hops * keys_values * s.element,
            again + hops * keys_values * FLOAT32,
            messages=(1, 1 + s.recomputed),
            link=link,
        ),
        "rsa": _cost(
            hops * keys_values * s.element,
            again + hops * keys_values * (s.element + FLOAT32),
            messages=(2 * hops, 2 * hops * (1 + s.recomputed) + 1),
            link=link,
        ),
        "ring": _cost(
            mean * hops * keys_values * s.element,
            mean * hops * keys_values * (s.element + FLOAT32),
            messages=(ranks, ranks),
            link=LinkSpeed(latency, bandwidth * mean / busiest),
        ),
    }
    # TokenRing: queries one way, results the other
    query, result = rows * s.q_heads * s.key_dim, rows * s.q_heads * (s.value_dim + 1) * FLOAT32
    bundle = rows * s.q_heads * ((s.key_dim + s.value_dim) * s.element + 2 * FLOAT32)
    costs["token_ring"] = Cost(
        mean * hops * (query * s.element + result),
        mean * hops * (bundle + query * FLOAT32),
        ranks * latency + busiest * hops * max(query * s.element, result) / bandwidth,
        ranks * latency + busiest * hops * max(bundle, query * FLOAT32) / bandwidth,
    )
    if s.q_heads % ranks == 0 and (s.kv_heads % ranks == 0 or ranks % s.kv_heads == 0):
        heads = max(s.kv_heads, ranks)
        features = s.q_heads * (s.key_dim + s.value_dim) + heads * (s.key_dim + s.value_dim)
        moved = hops / ranks * rows * features * s.element
        costs["ulysses"] = _cost(moved, moved, messages=(2, 2), link=link)
    return costs


def _cost(forward: float, backward: float, *, messages: tuple[int, int], link: LinkSpeed) -> Cost:
    """messages: one after another, in the forward and in the backward pass."""
    (latency, bandwidth), (before, after) = link, messages
    return Cost(forward, backward, before * latency + forward / bandwidth, after * latency + backward / bandwidth)


def choose_linear(sizes: Sizes, *, log: bool) -> str:
    """The strategy that `strategy="auto"` stands for in a linear layer."""
    return _choose("linear", sizes, log)


def choose_softmax(sizes: Sizes, *, log: bool) -> str:
    """The strategy that `strategy="auto"` stands for in a softmax layer."""
    return _choose("softmax", sizes, log)


@lru_cache(maxsize=256)  # and so one line in the log for every new choice
def _choose(kind: str, sizes: Sizes, log: bool) -> str:
    model: Mapping[str, Callable[[Sizes], dict[str, Cost]]] = {"linear": linear_costs, "softmax": softmax_costs}
    costs = model[kind](sizes)
    left_out = _unsuitable(sizes, costs) if kind == "softmax" else {}
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
