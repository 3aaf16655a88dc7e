"""How long planning takes, by devices and model: python scripts/bench_planner.py [--profile llama-3.1-8b-h100]"""

from __future__ import annotations

import argparse
import time

from linear_llama3.sequence_parallel.planner import Cluster, load_profile, model_costs, plan
from linear_llama3.sequence_parallel.planner.lengths import read_lengths
from linear_llama3.sequence_parallel.planner.report import MODELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="llama-3.1-8b-h100")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--sequences", type=int, default=512, help="of a step")
    parser.add_argument("--max-length", type=int, default=196608)
    parser.add_argument("--repeats", type=int, default=3, help="steps")
    arguments = parser.parse_args()

    profile = load_profile(arguments.profile)
    lengths = read_lengths("wikipedia", arguments.sequences * arguments.repeats).clip(max=arguments.max_length)
    print(
        f"profile {profile.name} ({profile.origin}), {arguments.sequences} sequences a step, {arguments.repeats} steps"
    )
    print(
        "| devices | model | slowest plan, s of one core | the first, with its list of partitions |\n|---|---|---|---|"
    )
    for devices in arguments.devices:
        for name, every in MODELS.items():
            costs = model_costs(profile, devices, model=profile.model.with_softmax_every(every))
            cluster, seconds = Cluster(devices=devices, memory=profile.bytes.device), []
            for step in lengths.reshape(arguments.repeats, -1).tolist():
                start = time.process_time()
                plan(step, cluster, costs)
                seconds.append(time.process_time() - start)
            print(f"| {devices} | {name} | {max(seconds):.3f} | {seconds[0]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
