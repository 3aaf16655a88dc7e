"""Compare plans with the best of all plans: python -m tests.helpers.planner_quality [--sequences 11]

The best is that of `planner_exact.py`, which test_search.py compares with plain enumeration.
"""

from __future__ import annotations

import argparse

from linear_llama3.sequence_parallel.planner import plan
from linear_llama3.sequence_parallel.planner.group_costs import tabulate
from linear_llama3.sequence_parallel.planner.search import search
from tests.helpers.planner_cases import Case, random_case
from tests.helpers.planner_exact import exact_cost

DEVICES = (2, 3, 4, 6, 8)


def slower_than_best(case: Case) -> float | None:
    """Cost of the plan over that of the best one; None if there is none.

    Raises:
        AssertionError: the planner found none, but there is one.
    """
    table = tabulate(*case)
    best = exact_cost(table)
    if best is None:
        return None
    found = search(table)
    assert found is not None, "a plan exists, but none was found"
    return found.cost(table) / best


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
