"""The README's table of tools: its rows are the tests of this folder, its versions those that the tests run with."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = {
    "PEFT": "peft",
    "TRL": "trl",
    "lm-evaluation-harness": "lm_eval",
    "datasets": "datasets",
    "pipeline": "transformers",
}
DO_NOT_WORK = ["Liger kernels", "vLLM", "GGUF, llama.cpp", "assisted decoding"]


def tables() -> list[list[list[str]]]:
    """Cells of the section's tables, without their heads."""
    section = (ROOT / "README.md").read_text().split("### Ecosystem\n")[1].split("\n#")[0]
    blocks = [block.splitlines()[2:] for block in section.split("\n\n") if block.startswith("|")]
    return [[[cell.strip() for cell in row.strip("|").split(" | ")] for row in block] for block in blocks]


def test_tools() -> None:
    rows, _ = tables()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    files = {path.name for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).name, "test_liger.py"}
    assert [row[0].split("]")[0].strip("[") for row in rows] == list(TOOLS)
    assert {row[0].split("/")[-1].strip(")") for row in rows} == files
    for row, name in zip(rows, TOOLS.values(), strict=True):
        assert (ROOT / row[0].split("(")[1].strip(")")).is_file()
        assert row[1] == f"{name} {pins[name]}"


def test_what_does_not_work() -> None:
    """Refusals of `use_liger_kernel` and of assisted decoding are tested where they are made."""
    _, rows = tables()
    assert [row[0] for row in rows] == DO_NOT_WORK
