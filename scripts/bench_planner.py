"""Time the planner: python scripts/bench_planner.py [--devices 64 1024] [--profile flexsp-gpt-7b-a100]"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from linear_llama3.sequence_parallel.planner import Cluster, load_profile, model_costs, plan
from linear_llama3.sequence_parallel.planner.lengths import read_lengths
from linear_llama3.sequence_parallel.planner.report import MODELS

# (number, the longest that a group holds, random numbers) -> lengths
LENGTHS: dict[str, Callable[[int, int, np.random.Generator], np.ndarray]] = {
    "Wikipedia's": lambda count, longest, rng: read_lengths("wikipedia", count),
    "lognormal, median 4,000": lambda count, longest, rng: rng.lognormal(8.3, 1, count),
    "uniform up to an eighth of the longest": lambda count, longest, rng: rng.integers(1, longest // 8, count),
    "a fifth to a quarter of the longest": lambda count, longest, rng: rng.integers(longest // 5, longest // 4, count),
    "one in ten half the longest": lambda count, longest, rng: np.where(rng.random(count) < 0.1, longest // 2, 500),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="llama-3.1-8b-h100")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--sequences", type=int, default=512, help="in a step")
    parser.add_argument("--max-length", type=int, default=393216)
    arguments = parser.parse_args()

    profile = load_profile(arguments.profile)
    print(f"profile {profile.name} ({profile.origin}), {arguments.sequences} sequences a step, seconds of one core\n")
    print(f"| devices | lengths | {' | '.join(MODELS)} |\n|---|---|{'---|' * len(MODELS)}")
    for devices in arguments.devices:
        cluster = Cluster(devices=devices, memory=profile.bytes.device)
        for kind, lengths in LENGTHS.items():
            seconds = []
            for every in MODELS.values():
                costs = model_costs(profile, devices, model=profile.model.with_softmax_every(every))
                held = max(costs.capacity(degree, cluster.memory) for degree in costs.by_degree)
                longest = min(held, arguments.max_length)
                step = lengths(arguments.sequences, longest, np.random.default_rng(0)).astype(int).clip(1, longest)
                start = time.process_time()
                plan(step.tolist(), cluster, costs)
                seconds.append(f"{time.process_time() - start:.2f}")
            print(f"| {devices} | {kind} | {' | '.join(seconds)} |", flush=True)


if __name__ == "__main__":
    main()
