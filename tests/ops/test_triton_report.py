"""Every configuration compiled for GPUs that need not be there: nothing spills, products run on tensor cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHARED_KIB = {"sm_80": 99, "sm_90": 227}  # of a block; 163 on an A100, 99 on consumer GPUs of its generation
PRODUCTS = ("state_scan", "output", "backward")


def report(*options: str) -> list[dict[str, str]]:
    """The rows of the table, by column. It runs in a separate process, since this one interprets the kernels."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts/kernel_report.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in done.stdout.splitlines()]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


@pytest.mark.parametrize(
    ("capability", "dtype", "dims", "groups"),
    [
        ("80", "bfloat16", ("64", "128"), ("1", "4")),
        ("80", "bfloat16", ("256",), ("1",)),
        ("90", "bfloat16", ("64", "128"), ("1", "4")),
        ("90", "bfloat16", ("256",), ("1",)),
        ("90", "float16", ("64",), ("1",)),
        ("80", "float32", ("128",), ("1",)),
        ("90", "float32", ("128",), ("4",)),
    ],
)
def test_no_configuration_spills(capability: str, dtype: str, dims: tuple[str, ...], groups: tuple[str, ...]) -> None:
    rows = report("--capability", capability, "--dtypes", dtype, "--dims", *dims, "--groups", *groups)
    assert {row["kernel"] for row in rows} == {*PRODUCTS, "merge", "gate_cumsum", "decode"}
    for row in rows:
        assert row["spilled bytes"] == "0", row
        assert int(row["shared KiB"]) <= SHARED_KIB[row["case"].split()[0]], row
        if row["kernel"] in PRODUCTS:
            assert int(row["wgmma"]) + int(row["mma"]) > 0, row
            assert int(row["wgmma"]) > 0 or (capability, dtype) != ("90", "bfloat16"), row
