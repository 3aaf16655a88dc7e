"""Plans pairs of micro-batches anew: exactly, but for short sequences that stay together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import chain, combinations

import numpy as np

from .effort import Effort
from .exact import FEW, exact_parts, exact_seconds
from .group_costs import Table
from .placement import SMALL, Part
from .polish import polish


def replan_pairs(table: Table, parts: list[Part], effort: Effort, *, any_number: bool) -> list[Part]:
    """While it makes one or two micro-batches of up to SMALL sequences faster and there is effort left.

    Args:
        any_number: of micro-batches, instead of as many as there were.
    """
    known: set[bytes] = set()  # sequences that were planned anew before
    while True:
        faster = next(_faster(table, parts, effort, any_number, known), None)
        if faster is None:
            return parts
        old, new = faster
        parts = [part for n, part in enumerate(parts) if n not in old] + new


def _faster(
    table: Table, parts: list[Part], effort: Effort, any_number: bool, known: set[bytes]
) -> Iterator[tuple[tuple[int, ...], list[Part]]]:
    for own in chain(combinations(range(len(parts)), 1), combinations(range(len(parts)), 2)):
        rows = np.sort(np.concatenate([parts[n].rows for n in own]))
        if not effort:
            return
        if len(rows) > SMALL or rows.tobytes() in known:
            continue
        known.add(rows.tobytes())
        new = plan_bundled(table.part(rows), None if any_number else len(own), effort)
        if sum(part.placement.ticks for part in new) < sum(parts[n].placement.ticks for n in own) and new:
            yield own, [Part(rows[part.rows], part.placement) for part in new]


def plan_bundled(table: Table, micro_batches: int | None, effort: Effort) -> list[Part]:
    """The best plan in which the shortest sequences stay together in bundles, FEW of them in all, and its polish."""
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
    """Rows of every bundle, the longest first: the two shortest become one (as in Huffman's code) until FEW."""
    heap = [(length, [row]) for row, length in enumerate(table.lengths.tolist())]
    heapify(heap)
    while len(heap) > FEW:
        (short, one), (long, other) = heappop(heap), heappop(heap)
        heappush(heap, (short + long, one + other))
    return [rows for _, rows in sorted(heap, reverse=True)]
