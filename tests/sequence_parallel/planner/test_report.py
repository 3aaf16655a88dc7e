"""`linear-llama3 plan`: table, groups, plot, and its advice for pure linear models."""

from __future__ import annotations

import os
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from typer.testing import CliRunner

from linear_llama3.cli import app
from linear_llama3.sequence_parallel.planner import Cluster, load_profile, lower_bound, model_costs, plan
from linear_llama3.sequence_parallel.planner import report as report_module
from linear_llama3.sequence_parallel.planner.lengths import WIKIPEDIA, read_lengths
from linear_llama3.sequence_parallel.planner.report import report


def rows(text: str) -> dict[str, list[str]]:
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in table[1:]}


def test_table_groups_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = read_lengths("wikipedia", 80).clip(max=30000)
    (tmp_path / "lengths.txt").write_text("\n".join(map(str, lengths)))
    report(str(tmp_path / "lengths.txt"), devices=16, batch=40, steps=2, max_length=30000, plot=tmp_path / "plan.png")
    text = capsys.readouterr().out
    assert text.startswith("Predicted by a cost model, not measured: profile flexsp-gpt-7b-a100 (published;")
    table = rows(text)
    assert list(table) == ["softmax", "hybrid 1/4", "hybrid 1/8", "pure linear"]

    profile = load_profile("flexsp-gpt-7b-a100")
    cluster = Cluster(devices=16, memory=profile.bytes.device)
    costs = model_costs(profile, 16, model=profile.model.with_softmax_every(4))
    steps = [plan(part.tolist(), cluster, costs) for part in (lengths[:40], lengths[40:])]
    bound = np.mean([lower_bound(part.tolist(), cluster, costs) for part in (lengths[:40], lengths[40:])])
    static, one, adaptive, least, *gains = table["hybrid 1/4"]
    assert float(adaptive) == pytest.approx(np.mean([step.seconds for step in steps]), abs=0.006)
    assert float(least) == pytest.approx(bound, abs=0.006)
    assert float(static.split()[0]) >= float(one) >= float(adaptive) >= float(least)
    assert float(gains[0][:-1]) == pytest.approx(float(static.split()[0]) / float(adaptive), abs=0.01)
    hybrid = text.split("hybrid 1/4:")[1].split("hybrid 1/8:")[0]
    for n, step in enumerate(steps):
        assert f"step {n}: {step}" in hybrid
    counted = [line.split(": ")[1].split(" ")[0] for line in hybrid.splitlines() if line.startswith("  degree")]
    assert sum(map(int, counted)) == 80
    assert matplotlib.image.imread(tmp_path / "plan.png").std() > 0.05


def test_command_line(tmp_path: Path) -> None:
    options = ["--devices", "8", "--batch", "24", "--steps", "1", "--max-length", "9000", "--linear", "lasp1"]
    done = CliRunner().invoke(app, ["plan", *options])
    assert done.exit_code == 0
    assert list(rows(done.output)) == ["softmax", "hybrid 1/4", "hybrid 1/8", "pure linear"]
    assert "(lasp1, " in done.output and "(lasp1)" in done.output
    assert CliRunner().invoke(app, ["plan", "--softmax", "lasp9"]).exit_code == 1


def test_packing_is_enough_only_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Enough with a scan inside a node; not over 64 ranks with softmax layers or a gather of all states."""
    report(devices=8, batch=64, steps=1, max_length=40000, linear="all_to_all")
    linear = capsys.readouterr().out.split("pure linear:")[1]
    assert "Plain packing is enough: groups of 8 for everything take" in linear
    report(devices=64, batch=64, steps=1, max_length=196608, linear="lasp2")
    assert "Plain packing" not in capsys.readouterr().out


def test_wikipedia_lengths_have_the_known_statistics() -> None:
    lengths = read_lengths("wikipedia", 200_000)
    for share, length in WIKIPEDIA.items():
        if 1e-3 <= share < 1:
            assert np.quantile(lengths, 1 - share) == pytest.approx(length, rel=0.1)
    assert lengths.mean() == pytest.approx(1014, rel=0.1)
    assert lengths[lengths <= 8192].sum() / lengths.sum() == pytest.approx(0.725, abs=0.05)
    assert (read_lengths("wikipedia", 10) == lengths[:10]).all()


def test_mistakes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    with pytest.raises(SystemExit, match=r"error: lengths must be .* got '.*lengths.txt'"):
        report(str(path))
    for wrong in ("x", "5.5", "0", "-3", "9" * 13, "9" * 20, "9" * 5000, "1e3", "nan"):
        path.write_text(f"1 2 {wrong} 4")
        with pytest.raises(
            SystemExit, match=f"error: a file of lengths must hold integers from 1 on, .* got '{wrong}'"
        ):
            report(str(path), batch=1, steps=1)
    path.write_bytes(b"\xff\xfe 1")
    with pytest.raises(SystemExit, match=r"error: lengths must be .* got '.*lengths.txt'.*can't decode"):
        report(str(path))
    path.write_text("1 2 3")
    with pytest.raises(SystemExit, match=r"error: the file must hold 8 lengths .* got 3"):
        report(str(path), batch=4, steps=2)
    with pytest.raises(SystemExit, match="error: a profile must be one of"):
        report(profile="none")
    with pytest.raises(SystemExit, match="error: every sequence must fit some group"):
        report(devices=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (f"--{name} {value}", f"Invalid value for .*{name}")
            for name in ("steps", "batch", "devices", "max-length")
            for value in ["0"]
        ),
        *((f"--memory {value}", "memory of a cluster must be positive, got ") for value in ("0", "-3", "nan")),
        ("--profile folder.json", "a profile is a JSON file .*folder.json"),
        ("--profile profile.txt", "a profile must be one of .* or a .json file, got 'profile.txt'"),
        ("--lengths folder.json", "lengths must be .* got 'folder.json'"),
        ("--plot missing/x.png", "got missing/x.png, whose folder cannot be written or does not exist; choose another"),
        ("--plot folder.png", "got folder.png, which cannot be written; choose another"),
        ("--plot lengths.txt/x.png", "got lengths.txt/x.png, whose folder cannot be written"),
        *(
            (f"--plot {name}", f"must end in .png or .* got {name}; choose another")
            for name in ("x.xyz", "x", "folder")
        ),
    ],
)
def test_mistakes_are_refused_before_planning(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ends with a message, without a traceback."""
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "folder.json", "folder.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lengths.txt").write_text("500 3000 " * 20)
    monkeypatch.setattr(report_module, "plan", lambda *arguments: pytest.fail("planned before it was refused"))
    defaults = ["--lengths", "lengths.txt", "--devices", "8", "--batch", "8", "--steps", "1"]
    done = CliRunner().invoke(app, ["plan", *defaults, *options.split()], env={"COLUMNS": "500"})
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit), done.exception
    assert re.search(message, f"{done.output} {done.exception}")


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # the superuser may write anywhere
    with pytest.raises(SystemExit, match=r"x.png, whose folder cannot be written or does not exist"):
        report(plot=tmp_path / "x.png")


def test_memory_and_cuts_without_end(tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_text("500 3000 " * 4)
    options = ["plan", "--lengths", str(tmp_path / "lengths.txt"), "--devices", "4", "--batch", "8", "--steps", "1"]
    tables = []
    for memory in ("1000000", "inf", "1e300"):
        done = CliRunner().invoke(app, [*options, "--memory", memory])
        assert done.exit_code == 0
        tables.append(rows(done.output))
    assert tables[0] == tables[1] == tables[2]
    assert CliRunner().invoke(app, [*options, "--max-length", "9" * 30]).exit_code == 0
