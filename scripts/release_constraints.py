"""Print pip constraints for one end of pyproject.toml's ranges: python scripts/release_constraints.py oldest|newest"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def constraints(end: str, torch: str | None = None) -> list[str]:
    """Return lines for pip: the lowest minor release of every range for "oldest", nothing for "newest".

    Args:
        torch: a release of torch to use instead of the range's end.
    """
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    lines = []
    for requirement in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["test"]]):
        lowest = [part.version for part in requirement.specifier if part.operator == ">="]
        if requirement.name == "torch" and torch is not None:
            lines.append(f"torch=={torch}")
        elif requirement.name == "triton" and torch is not None:
            continue  # each release of torch requires its own
        elif end == "oldest" and lowest:
            lines.append(f"{requirement.name}=={lowest[0]}.*")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("end", choices=["oldest", "newest"])
    parser.add_argument("--torch", help="release of torch, such as 2.13.0")
    arguments = parser.parse_args()
    print("\n".join(constraints(arguments.end, arguments.torch)))
