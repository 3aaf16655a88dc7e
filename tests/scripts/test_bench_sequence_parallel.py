"""The benchmark of the strategies reports bytes equal to theory and errors of rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.slow
def test_counted_bytes_of_every_strategy_equal_theory(tmp_path: Path) -> None:
    out, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    sizes = ["--linear-lengths", "72", "--softmax-lengths", "64", "--q-heads", "4", "--kv-heads", "2", "--dim", "16"]
    command = [sys.executable, str(SCRIPTS / "bench_sequence_parallel.py"), "--ranks", "2", "--repeats", "1", *sizes]
    command += ["--out", str(out), "--plot", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["strategy"] for row in rows} >= {"lasp1", "lasp2", "all_scan", "all_to_all", "lasp2h", "ring"}
    assert len(done.stdout.splitlines()) == 2 * 3 + len(rows) and plot.stat().st_size > 10_000
    for row in rows:
        assert row["forward_bytes"] == row["theory_forward_bytes"], row
        assert row["backward_bytes"] == row["theory_backward_bytes"], row
        assert 0 < row["error"] < 1e-5 or row["strategy"] == "ulysses", row
        assert row["seconds"] > 0


def test_slow_links_require_root_and_iproute2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import slow_network

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(slow_network.shutil, "which", lambda tool: "/sbin/" + tool)
    with pytest.raises(SystemExit, match="needs root"):
        slow_network.require_network_tools()
    monkeypatch.setattr(slow_network.shutil, "which", lambda tool: None)
    with pytest.raises(SystemExit, match="needs ip and tc"):
        slow_network.require_network_tools()
