"""Prediction of what adaptive groups would gain, without any device: `linear-llama3 plan`.

linear-llama3 plan --lengths FILE --devices 64 --plot plan.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from .checks import check_output
from .group_costs import Cluster, Integers
from .lengths import read_lengths
from .profile import Profile, load_profile, model_costs, profile_names
from .step_plan import StepPlan, lower_bound, plan, plan_one_degree

MODELS = {"softmax": 1, "hybrid 1/4": 4, "hybrid 1/8": 8, "pure linear": None}  # every n-th layer is softmax
PACKING_TOLERANCE = (
    1.03  # packing is enough if its step takes at most this factor longer: half of the error that FlexSP
)
# reports for its cost model
IMAGES = (".png", ".pdf", ".svg", ".jpg")
WAYS = ("static", "best one degree", "adaptive", "lower bound")


class Forecast:
    """Predicted seconds of one model's steps, by the way of grouping."""

    def __init__(
        self,
        name: str,
        steps: list[Integers],
        cluster: Cluster,
        profile: Profile,
        *,
        longest: int,
        linear: str = "auto",
        softmax: str = "auto",
    ) -> None:
        """longest: tokens of a sequence that the degree of a static run must hold."""
        self.name, self.steps = name, steps
        model = profile.model.with_softmax_every(MODELS[name])
        self.costs = model_costs(profile, cluster.devices, model=model, linear=linear, softmax=softmax)
        fits = [d for d in self.costs.by_degree if self.costs.capacity(d, cluster.memory) >= longest]
        self.static_degree = min(fits, default=max(self.costs.by_degree))
        self.plans = [plan(lengths.tolist(), cluster, self.costs) for lengths in steps]
        rigid = [plan_one_degree(lengths.tolist(), cluster, self.costs, degree=self.static_degree) for lengths in steps]
        one = [plan_one_degree(lengths.tolist(), cluster, self.costs) for lengths in steps]
        bounds = [lower_bound(lengths.tolist(), cluster, self.costs) for lengths in steps]
        seconds = _mean(rigid), _mean(one), _mean(self.plans), float(np.mean(bounds))
        self.seconds = dict(zip(WAYS, seconds, strict=True))

    @property
    def packing_is_enough(self) -> bool:
        return self.seconds["static"] <= PACKING_TOLERANCE * self.seconds["adaptive"]

    def lengths_by_degree(self) -> dict[int, Integers]:
        found: dict[int, list[int]] = {}
        for lengths, step in zip(self.steps, self.plans, strict=True):
            for group in (group for batch in step.micro_batches for group in batch.groups):
                found.setdefault(group.degree, []).extend(lengths[list(group.sequences)].tolist())
        return {degree: np.array(found[degree]) for degree in sorted(found)}


def _mean(plans: list[StepPlan] | list[StepPlan | None]) -> float:
    """Mean seconds of a step; infinite if one has no plan."""
    return float(np.mean([step.seconds if step else np.inf for step in plans]))


def report(
    lengths: Annotated[str, typer.Option(help='A text file with a length on each line, or "wikipedia".')] = "wikipedia",
    devices: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 64,
    profile: Annotated[
        str, typer.Option(help=f"JSON file of a profile or {', '.join(profile_names())}.")
    ] = "flexsp-gpt-7b-a100",
    memory: Annotated[
        float | None, typer.Option(help="GiB of each device; inf for no limit. Default: the profile's.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps to plan.")] = 4,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Cut sequences to this length, which the static degree must hold.")
    ] = None,
    linear: Annotated[str, typer.Option(help="Strategy of linear layers.")] = "auto",
    softmax: Annotated[str, typer.Option(help="Strategy of softmax layers.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help=f"Image to write ({', '.join(IMAGES)}).")] = None,
) -> None:
    """Predict the step time with adaptive sequence-parallel groups, for softmax, hybrid and linear models."""
    try:
        if plot is not None:
            check_output(plot, IMAGES)
        chosen = load_profile(profile)
        drawn = read_lengths(lengths, batch * steps)
        if max_length is not None:
            drawn = drawn.clip(max=max_length)
        cluster = Cluster(devices=devices, memory=chosen.bytes.device if memory is None else memory * 2**30)
        cuts, longest = np.split(drawn, steps), max_length or int(drawn.max())
        found = [
            Forecast(name, cuts, cluster, chosen, longest=longest, linear=linear, softmax=softmax) for name in MODELS
        ]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(describe(found, chosen, cluster))
    if plot is not None:
        draw(found, chosen, cluster, plot)


def describe(forecasts: list[Forecast], profile: Profile, cluster: Cluster) -> str:
    everything = np.concatenate(forecasts[0].steps)
    lines = [
        f"Predicted by a cost model, not measured: profile {profile.name} ({profile.origin}; {profile.hardware}).",
        f"{cluster.devices} devices of {cluster.memory / 2**30:.0f} GiB; {len(forecasts[0].steps)} steps of "
        f"{len(forecasts[0].steps[0])} sequences: mean {everything.mean():,.0f} tokens, median "
        f"{np.median(everything):,.0f}, longest {everything.max():,}.",
        "",
        "| seconds a step | static | best one degree | adaptive | lower bound | vs static | vs one degree |",
        "|---|---|---|---|---|---|---|",
    ]
    for forecast in forecasts:
        seconds = forecast.seconds
        static, one, adaptive, bound = (f"{seconds[way]:.2f}" for way in WAYS)
        gains = (f"{seconds[way] / seconds['adaptive']:.2f}x" for way in WAYS[:2])
        static = f"{static} (degree {forecast.static_degree})"
        lines.append("| " + " | ".join([forecast.name, static, one, adaptive, bound, *gains]) + " |")
    for forecast in forecasts:
        lines += ["", f"{forecast.name}:", *(f"  step {n}: {step}" for n, step in enumerate(forecast.plans))]
        for degree, own in forecast.lengths_by_degree().items():
            costs = forecast.costs.by_degree[degree]
            names = ", ".join(name for name in (costs.linear, costs.softmax) if name)
            lines.append(
                f"  degree {degree}{f' ({names})' if names else ''}: {len(own)} sequences, {own.sum():,} tokens, "
                f"{own.min():,} to {own.max():,} long"
            )
        if forecast.packing_is_enough:
            lines.append(
                f"  Plain packing is enough: groups of {forecast.static_degree} for everything take "
                f"{100 * (forecast.seconds['static'] / forecast.seconds['adaptive'] - 1):.1f} % longer."
            )
    return "\n".join(lines)


def draw(forecasts: list[Forecast], profile: Profile, cluster: Cluster, path: Path) -> None:
    """Plot the seconds of a step above, and below the lengths that each degree gets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(forecasts), 7), layout="constrained")
    figure.suptitle(f"Predicted, not measured: {cluster.devices} devices, profile {profile.name} ({profile.origin})")
    grid = figure.add_gridspec(2, len(forecasts))
    top = figure.add_subplot(grid[0, :])
    for n, way in enumerate(WAYS):
        heights = [forecast.seconds[way] for forecast in forecasts]
        top.bar(np.arange(len(forecasts)) + 0.2 * (n - 1.5), np.where(np.isfinite(heights), heights, 0), 0.2, label=way)
    top.set_xticks(range(len(forecasts)), [forecast.name for forecast in forecasts])
    top.set_ylabel("seconds a step")
    top.legend()
    first = None
    for n, forecast in enumerate(forecasts):
        axis = first = figure.add_subplot(grid[1, n], sharey=first)
        by_degree = forecast.lengths_by_degree()
        axis.violinplot([np.log10(own) for own in by_degree.values()], showmedians=True, widths=0.8)
        axis.set_xticks(range(1, len(by_degree) + 1), [str(degree) for degree in by_degree])
        axis.set_xlabel(f"degree, {forecast.name}")
        axis.yaxis.set_major_formatter(lambda power, _: f"{10**power:,.0f}")
    if first is not None:
        figure.axes[1].set_ylabel("tokens of a sequence")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    typer.run(report)
