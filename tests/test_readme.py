"""The README's tables: their names are those of the registries, their rows have tests, their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from linear_llama3.modeling import MIXERS
from linear_llama3.ops.feature_maps import FEATURE_MAPS
from linear_llama3.sequence_parallel import LINEAR_STRATEGIES, SOFTMAX_STRATEGIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOOLS = {
    "PEFT": "peft",
    "TRL": "trl",
    "lm-evaluation-harness": "lm_eval",
    "datasets": "datasets",
    "pipeline": "transformers",
}
DO_NOT_WORK = ["Liger kernels", "vLLM", "GGUF, llama.cpp", "assisted decoding"]


def tables(title: str) -> list[list[list[str]]]:
    """Cells of the tables of a section, without their heads."""
    section = README.split(f"# {title}\n")[1].split("\n#")[0].strip()
    blocks = [block.splitlines()[2:] for block in section.split("\n\n") if block.startswith("|")]
    return [[[cell.strip() for cell in row.strip("|").split(" | ")] for row in block] for block in blocks]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "scripts/results/README.md"])
def test_links(page: str) -> None:
    """To files of the repository, and to headings."""
    path = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, link


def test_strategies() -> None:
    linear, softmax = tables("Ways of sharding")[:2]
    assert [names(row[0])[0] for row in linear] == list(LINEAR_STRATEGIES)
    assert [names(row[0])[0] for row in softmax] == list(SOFTMAX_STRATEGIES)


def test_what_works() -> None:
    """Every row that claims something names its tests; those without say no."""
    (rows,) = tables("What works, and what does not yet")
    assert names(rows[0][0]) == list(MIXERS) and names(rows[1][0]) == list(FEATURE_MAPS)
    for what, state, tests in rows:
        files = re.findall(r"\]\((tests/(?:\w+/)*test_\w+\.py)\)", tests)
        assert files or state.startswith(("no.", "no,", "not ")) or "**not run" in state, what
        assert all((ROOT / file).is_file() for file in files), what


def test_tools() -> None:
    rows, _ = tables("Ecosystem")
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    files = {path.name for path in (ROOT / "tests/ecosystem").glob("test_*.py")} - {"test_liger.py"}
    assert [row[0].split("]")[0].strip("[") for row in rows] == list(TOOLS)
    assert {row[0].split("/")[-1].strip(")") for row in rows} == files
    for row, name in zip(rows, TOOLS.values(), strict=True):
        assert (ROOT / row[0].split("(")[1].strip(")")).is_file()
        assert row[1] == f"{name} {pins[name]}"


def test_what_does_not_work() -> None:
    """Refusals of `use_liger_kernel` and of assisted decoding are tested where they are made."""
    _, rows = tables("Ecosystem")
    assert [row[0] for row in rows] == DO_NOT_WORK
