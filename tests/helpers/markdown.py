"""Parts of Markdown pages: links, headings, code blocks, table rows, and the commands of shell blocks."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A code block of a page."""

    page: str
    language: str
    code: str


def pages() -> list[str]:
    """Return the pages that readers start from, relative to the repository."""
    docs = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
    return ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "scripts/results/README.md", *docs]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "``", _FENCE.sub("", text))


def links(text: str) -> list[str]:
    """Return the targets of all links and images outside code that do not lead to another site."""
    targets = re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", text))
    return [target for target in targets if "://" not in target]


def anchors(text: str) -> set[str]:
    """Return GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(language: str) -> list[Block]:
    """Return the code blocks of all pages in `language`."""
    found = [(page, *match) for page in pages() for match in _FENCE.findall(read(page))]
    return [Block(page, name, code) for page, name, code in found if name == language]


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of all table rows outside code."""
    rows = [line for line in _FENCE.sub("", text).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def commands() -> list[tuple[str, list[str]]]:
    """Return (page, words) of every command in shell blocks, without its comment and leading assignments and `sudo`."""
    found = []
    for block in blocks("bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and (re.match(r"[A-Z_]+=", words[0]) or words[0] == "sudo"):
                words = words[1:]
            if words:
                found.append((block.page, words))
    return found
