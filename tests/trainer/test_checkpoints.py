"""Complete and incomplete checkpoints, the one from which a run continues, and those that are deleted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from linear_llama3.trainer.checkpoints import manifest as checkpoints


def write(folder: Path, *, plain: bool = False, age: int = 0) -> Path:
    """Write a complete checkpoint; `plain` as transformers' Trainer leaves it; `age` in hours."""
    if plain:
        folder.mkdir(parents=True)
    else:
        checkpoints.begin(folder)
        assert checkpoints.find_defect(folder) == "its save did not finish"
    (folder / "shards").mkdir()
    (folder / "shards" / "0.distcp").write_bytes(b"optimizer")
    save_file({"weight": torch.ones(100)}, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text("{}")
    if not plain:
        checkpoints.finish(folder, {"order": [1]})
        assert checkpoints.read_facts(folder) == {"order": [1]}
    time = folder.stat().st_mtime - 3600 * age
    os.utime(folder, (time, time))
    assert checkpoints.find_defect(folder) is None
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
def test_a_truncated_checkpoint_is_incomplete(plain: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-1", plain=plain)
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    cut(weights)
    expected = "incomplete" if plain else f"model.safetensors has {size - 1} bytes of {size}"
    assert expected in str(checkpoints.find_defect(folder))
    folder = write(tmp_path / "checkpoint-2", plain=plain)
    (folder / "trainer_state.json").unlink()
    assert "trainer_state.json" in str(checkpoints.find_defect(folder))
    folder = write(tmp_path / "checkpoint-3", plain=plain)
    cut(folder / ("trainer_state.json" if plain else checkpoints.MANIFEST_NAME))
    assert "cannot be read" in str(checkpoints.find_defect(folder))
    assert checkpoints.find_defect(tmp_path / "checkpoint-4") == "there is no such folder"


def test_all_files_are_on_the_disk_before_the_manifest_says_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        folder = tmp_path / "checkpoint-1"
        assert not json.loads((folder / checkpoints.MANIFEST_NAME).read_text())["complete"]
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "checkpoint-1")
    assert sorted(synced) == ["0.distcp", "model.safetensors", "trainer_state.json"]


def test_a_missing_file_or_a_mark_makes_a_checkpoint_incomplete(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-1")
    (folder / "shards" / "0.distcp").unlink()
    assert checkpoints.find_defect(folder) == "shards/0.distcp is missing"
    plain = write(tmp_path / "checkpoint-2", plain=True)
    (plain / "checkpoint-is-incomplete.txt").touch()  # transformers' enable_jit_checkpoint
    assert checkpoints.find_defect(plain) == "its save did not finish"


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "none") is None
    for step in (5, 10, 100):
        write(tmp_path / f"checkpoint-{step}", plain=step == 5)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-100"
    cut(tmp_path / "checkpoint-100" / "model.safetensors")
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-10"
    checkpoints.begin(tmp_path / "checkpoint-10")
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-5"
    assert checkpoints.steps(tmp_path) == [100, 10, 5]


@pytest.mark.parametrize(
    ("limit", "best", "broken", "left"),
    [
        (None, None, (), [1, 2, 3, 4]),
        (2, None, (), [3, 4]),
        (1, None, (), [4]),
        (1, 2, (), [2, 4]),
        (2, 1, (), [1, 4]),
        (3, 1, (), [1, 3, 4]),
        (1, None, (4,), [1, 2, 3, 4]),
        (2, None, (3,), [2, 4]),
        (1, 2, (2, 3), [4]),
        (1, None, (1, 2, 3, 4), [1, 2, 3, 4]),
    ],
)
def test_a_limit_counts_complete_checkpoints(
    limit: int | None, best: int | None, broken: tuple[int, ...], left: list[int], tmp_path: Path
) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path / f"checkpoint-{step}", age=4 - step)
        if step in broken:
            cut(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    (tmp_path / "checkpoint-mine").mkdir()
    best_folder = None if best is None else str(tmp_path / f"checkpoint-{best}")
    checkpoints.rotate(tmp_path, limit, saved=tmp_path / "checkpoint-4", best=best_folder)
    folders = {f"checkpoint-{step}" for step in left} | {"checkpoint-mine"}
    assert {path.name for path in tmp_path.iterdir()} == folders


def test_age_matters_more_than_the_step(tmp_path: Path) -> None:
    """A new run in the folder of an older one: its first checkpoints are the newest."""
    for step, age in ((900, 2), (1000, 1), (10, 0)):
        write(tmp_path / f"checkpoint-{step}", age=age)
    checkpoints.rotate(tmp_path, 2, saved=tmp_path / "checkpoint-10", best=None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1000", "checkpoint-10"}


def test_the_checkpoint_just_saved_stays(tmp_path: Path) -> None:
    """Even if the file system keeps no times and a folder with a larger step seems newer."""
    for step in (5, 4):
        os.utime(write(tmp_path / f"checkpoint-{step}"), (0, 0))
    checkpoints.rotate(tmp_path, 1, saved=tmp_path / "checkpoint-4", best=None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_save_that_is_repeated_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-1")
    (folder / "rng_state_7.pth").touch()  # of more processes
    checkpoints.begin(folder)
    assert [path.name for path in folder.iterdir()] == [checkpoints.MANIFEST_NAME]
    assert not json.loads((folder / checkpoints.MANIFEST_NAME).read_text())["complete"]
