"""How far plans are from the best of all: python -m tests.helpers.planner_quality [--sequences 11]

The best is searched by `exact_parts`, which test_plan.py compares with plain enumeration, for more sequences than the
planner does.
"""

from __future__ import annotations

import argparse

from linear_llama3.sequence_parallel.planner import plan
from linear_llama3.sequence_parallel.planner.exact import exact_parts
from linear_llama3.sequence_parallel.planner.group_costs import Table, tabulate
from linear_llama3.sequence_parallel.planner.placement import Part
from tests.helpers.planner_cases import Case, random_case, seconds

DEVICES = (2, 3, 4, 6, 8)


def slower_than_best(case: Case) -> float | None:
    """Seconds of the plan over those of the best one; None where there is none.

    Raises:
        ValueError: the planner found none, but there is one.
    """
    table = tabulate(*case)
    best = exact_parts(table)
    return plan(*case).seconds / sum(_slowest(case, table, part) for part in best) if best else None


def _slowest(case: Case, table: Table, part: Part) -> float:
    """Seconds of a micro-batch, by definition."""
    lengths, _, costs = case
    degrees, groups = part.placement.degrees.tolist(), part.placement.groups
    ids = [table.ids[part.rows[groups == n]].tolist() for n in range(len(degrees))]
    return max(seconds([lengths[i] for i in own], d, costs) for d, own in zip(degrees, ids, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=11)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    ratios, several = [], 0
    for seed in range(arguments.steps):
        case = random_case(seed, sequences=arguments.sequences, devices=DEVICES[seed % len(DEVICES)])
        if (ratio := slower_than_best(case)) is not None:
            ratios.append(ratio)
            several += len(plan(*case).micro_batches) > 1
    print(
        f"{len(ratios)} steps of {arguments.sequences} sequences on {DEVICES} devices, {several} of several "
        f"micro-batches: slower than the best plan by {sum(ratios) / len(ratios) - 1:.2%} in the mean, "
        f"{max(ratios) - 1:.1%} at worst, over 2 % in {sum(ratio > 1.02 for ratio in ratios)}"
    )


if __name__ == "__main__":
    main()
