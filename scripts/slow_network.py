"""Run a command with a network namespace per rank, joined by links of a limited rate (Linux, iproute2, root).

    python scripts/slow_network.py RANKS RATE COMMAND ...    # RATE in tc's notation: 1gbit

Each namespace has one end of a veth pair; the other ends are attached to a bridge in a separate namespace. A token
bucket filter (tbf) at both ends of a pair limits what a rank sends and what it receives.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "linearllama3"


def require_network_tools() -> None:
    """Raise SystemExit if a tool or the rights are missing."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"--link-rate needs {' and '.join(missing)} (package iproute2), not found")
    if os.geteuid() != 0:
        raise SystemExit("--link-rate makes network namespaces and needs root; run it with sudo, or leave it out")


@contextmanager
def slow_network(ranks: int, rate: str) -> Iterator[list[str]]:
    """Yield the namespace of every rank; rank r has address 10.77.0.(r + 1) on the interface `eth0`."""
    require_network_tools()
    hub, names = f"{PREFIX}-hub", [f"{PREFIX}-{rank}" for rank in range(ranks)]
    limit = f"root tbf rate {rate} burst 256kb latency 50ms"
    try:
        for name in (hub, *names):
            _run(f"ip netns add {name}")
        _run(f"ip -n {hub} link add bridge0 type bridge")
        _run(f"ip -n {hub} link set bridge0 up")
        for rank, name in enumerate(names):
            _run(f"ip link add eth0 netns {name} type veth peer name port{rank} netns {hub}")
            _run(f"ip -n {hub} link set port{rank} master bridge0 up")
            _run(f"ip -n {name} addr add 10.77.0.{rank + 1}/24 dev eth0")
            _run(f"ip -n {name} link set eth0 up")
            _run(f"ip -n {name} link set lo up")
            _run(f"tc -n {name} qdisc add dev eth0 {limit}")
            _run(f"tc -n {hub} qdisc add dev port{rank} {limit}")
        yield names
    finally:
        for name in (hub, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start_ranks(command: list[str], ranks: int, namespaces: list[str]) -> None:
    """Run a command once per rank, as torchrun does, in these namespaces if there are any, and wait for all."""
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "10.77.0.1" if namespaces else "127.0.0.1", "MASTER_PORT": str(free_port())}
    if namespaces:
        shared["GLOO_SOCKET_IFNAME"] = "eth0"
    processes = []
    for rank in range(ranks):
        prefix = ["ip", "netns", "exec", namespaces[rank]] if namespaces else []
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen([*prefix, *command], env=own))
    while any(process.poll() is None for process in processes) and not any(p.poll() for p in processes):
        time.sleep(0.1)
    if failed := [rank for rank, process in enumerate(processes) if process.poll()]:
        for process in processes:  # the others would wait forever
            process.kill()
        raise SystemExit(f"ranks {failed} failed")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sent_bytes() -> int | None:
    """Return the bytes that the kernel has sent on this namespace's link, headers included; None outside of one."""
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(counter.read_text()) if "GLOO_SOCKET_IFNAME" in os.environ and counter.is_file() else None


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"'{command}' failed: {done.stderr.strip()}")


if __name__ == "__main__":
    count = int(sys.argv[1])
    with slow_network(count, sys.argv[2]) as names:
        start_ranks(sys.argv[3:], count, names)
