"""One checkpoint for all tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.checkpoint import quickstart
from tests.helpers.ranks import run_distributed


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the quickstart's training leaves: weights, tokenizer, model card."""
    folder = tmp_path_factory.mktemp("quickstart")
    run_distributed(quickstart, 1, str(folder))
    return folder / "model"
