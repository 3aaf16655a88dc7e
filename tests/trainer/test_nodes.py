"""Groups that leave a node are warned of: torchrun's LOCAL_WORLD_SIZE says how many ranks a node has."""

from __future__ import annotations

import logging
import os
import re

import pytest

from linear_llama3.sequence_parallel import SequenceParallelConfig
from linear_llama3.trainer import SequenceParallelAccelerator
from linear_llama3.trainer.parallelism import warn_across_nodes
from tests.helpers.ranks import run_distributed
from tests.helpers.training import reset_accelerate

RANKS = 4


def warnings_of_a_launch(degree: int, per_node: int) -> list[str]:
    """Return this rank's warnings when `degree` ranks are joined, on nodes of `per_node`."""
    heard: list[str] = []
    handler, before = logging.Handler(), os.environ["LOCAL_WORLD_SIZE"]
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("linear_llama3.trainer.parallelism")
    logger.addHandler(handler)
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    reset_accelerate()
    try:
        SequenceParallelAccelerator(sequence_parallel_size=degree, sequence_parallel_config=SequenceParallelConfig())
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = before
        logger.removeHandler(handler)
        reset_accelerate()
    return heard


@pytest.mark.parametrize(
    ("degree", "per_node", "message"),
    [
        (2, 2, None),
        (4, 4, None),
        (2, 1, r"2 of 2 .* cross nodes of 1 processes, the first with the ranks \[0, 1\]"),
        (4, 2, r"1 of 1 .* cross nodes of 2 processes, .* \[0, 1, 2, 3\].* choose a degree that divides 2"),
        (2, 3, r"1 of 2 .* cross nodes of 3 processes, the first with the ranks \[2, 3\]"),
    ],
)
def test_groups_across_nodes(degree: int, per_node: int, message: str | None) -> None:
    first, *others = run_distributed(warnings_of_a_launch, RANKS, degree, per_node)
    assert others == [[]] * (RANKS - 1), "one warning, not one for every rank"
    if message is None:
        assert first == []
    else:
        (heard,) = first
        assert re.search(message, heard), heard


def test_without_torchruns_environment(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    warn_across_nodes(4, 4)
    assert not caplog.records
