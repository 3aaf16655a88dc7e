from __future__ import annotations

from itertools import combinations

import pytest

from linear_llama3.sequence_parallel.planner import Cluster, fewest_groups
from linear_llama3.sequence_parallel.planner.partitions import partitions
from linear_llama3.sequence_parallel.planner.step_plan import bytes_text


@pytest.mark.parametrize("devices", range(1, 20))
def test_fewest_groups(devices: int) -> None:
    """Of all partitions into degrees 1 and any of 2, 4, 8, 16."""
    for more in (own for count in range(5) for own in combinations((2, 4, 8, 16), count)):
        degrees = (1, *more)
        assert fewest_groups(reversed(degrees), devices) == partitions(devices, degrees).sum(1).min(), degrees


def test_texts_of_memory() -> None:
    sizes = {0: "0 bytes", 1023: "1023 bytes", 25000: "24.41 KiB", 2**20 - 1: "1024 KiB", 3 * 2**20: "3 MiB"}
    sizes |= {3 * 2**29: "1.5 GiB", 80 * 2**30: "80.0 GiB", 2**41: "2,048.0 GiB"}
    assert {size: bytes_text(size) for size in sizes} == sizes
    assert str(Cluster(devices=4, memory=3 * 2**29)) == "4 devices with 1.5 GiB each"
