"""Plans of a step whose shortest sequences stay together in bundles, so that so few are left that all can be tried."""

from __future__ import annotations

from dataclasses import replace
from heapq import heapify, heappop, heappush

import numpy as np

from .effort import Effort
from .exact import FEW, exact_parts, exact_seconds
from .group_costs import Table
from .placement import Part
from .polish import polish


def plan_bundled(table: Table, micro_batches: int | None, effort: Effort) -> list[Part]:
    """The best plan of FEW bundles, polished; empty if there is none."""
    bundles = _bundles(table)
    members = np.array([[n in bundle for n in range(len(table))] for bundle in bundles]).astype(np.int64)  # [B, K]
    bundled = replace(table, ids=np.arange(len(bundles)), lengths=members @ table.lengths, times=members @ table.times)
    effort.spend(exact_seconds(bundled))
    parts = []
    for part in exact_parts(bundled, micro_batches):
        group = part.placement.groups @ members[part.rows]  # [K]
        rows = np.flatnonzero(members[part.rows].any(0))
        parts.append(Part(rows, part.placement._replace(groups=group[rows])))
    return polish(table, parts, effort, pairs=True) if parts else []


def _bundles(table: Table) -> list[list[int]]:
    """Rows of every bundle, the longest first: the two shortest become one (as Huffman does) until FEW are left."""
    heap = [(length, [row]) for row, length in enumerate(table.lengths.tolist())]
    heapify(heap)
    while len(heap) > FEW:
        (short, one), (long, other) = heappop(heap), heappop(heap)
        heappush(heap, (short + long, one + other))
    return [rows for _, rows in sorted(heap, reverse=True)]
