"""Results of `bench_ops_gpu.py` as a table, notes and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = ("ours", "fla", "sdpa")

HEADER = (
    "| shape | gate | pass | ours ms | fla ms | SDPA ms | fla / ours | SDPA / ours | limit ms | % of limit "
    "| peak MiB ours / fla / SDPA | host us ours / fla / SDPA |\n" + "|---" * 12 + "|"
)


def table_row(row: dict[str, Any], bandwidth: float) -> str:
    """Return a row of the table; the limit is the time for the row's bytes at `bandwidth` bytes per second."""
    ms, limit = row["ms"], row["bytes"] / bandwidth * 1e3
    cells = [row["shape"], row["gate"], row["pass"], *(_figure(ms.get(name), 3) for name in NAMES)]
    cells += [_figure(_ratio(ms.get(name), ms.get("ours")), 2) for name in NAMES[1:]]
    cells += [f"{limit:.3f}", _figure(_ratio(100 * limit, ms.get("ours")), 0)]
    cells += [" / ".join(_figure(row[key].get(name), 0) for name in NAMES) for key in ("peak_mib", "host_us")]
    return f"| {' | '.join(cells)} |"


def _ratio(x: float | None, y: float | None) -> float | None:
    return None if x is None or y is None else x / y


def _figure(x: float | None, digits: int) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def plot(rows: list[dict[str, Any]], path: Path, title: str, bandwidth: float) -> None:
    """Plot the times of all shapes and gates, and their limits, in a panel for each pass."""
    from matplotlib.figure import Figure

    passes = dict.fromkeys(row["pass"] for row in rows)
    figure = Figure(figsize=(max(8, len(rows) / 4), 10), layout="constrained")
    figure.suptitle(title)
    for axes, which in zip(figure.subplots(len(passes), 1), passes, strict=True):
        chosen = [row for row in rows if row["pass"] == which]
        for i, name in enumerate(NAMES):
            known = [(x, row["ms"][name]) for x, row in enumerate(chosen) if name in row["ms"]]
            axes.bar([x + (i - 1) * 0.27 for x, _ in known], [y for _, y in known], width=0.25, label=name)
        limits = [row["bytes"] / bandwidth * 1e3 for row in chosen]
        places = range(len(chosen))
        axes.hlines(limits, [x - 0.4 for x in places], [x + 0.4 for x in places], "black", label="limit")
        axes.set(yscale="log", ylabel="ms", title=which)
        names = [f"{row['shape']} {row['gate']}" for row in chosen]
        axes.set_xticks(places, names, rotation=45, ha="right", fontsize=7)
        axes.legend()
    figure.savefig(path, dpi=110)


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """Return the reason for each missing figure, and the kernels of SDPA, once each with the rows they apply to."""
    where: dict[str, list[str]] = {}
    for row in rows:
        for peer, note in row["notes"].items():
            place = f"{row['shape']} {row['pass']}" + f" {row['gate']}" * (peer == "fla")
            where.setdefault(f"{peer}: {note}", []).append(place)
    return [f"{note} ({', '.join(dict.fromkeys(places))})" for note, places in where.items()]
