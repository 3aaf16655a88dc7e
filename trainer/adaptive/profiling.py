"""Measure a profile of a recipe's model on this machine for the planner: linear-llama3 profile RECIPE.yaml FILE.json

All processes compute the same micro-batches at the same time, and the slowest one counts, so that the figures include
contention for shared memory or cores. Layers are measured in models of one and three layers, so that a model whose
weights need all devices can be profiled; the costs of its own depth follow from the fits.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import accelerate
import numpy as np
import psutil
import torch
import torch.distributed as dist
import transformers
import typer
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ...modeling import LinearLlama3Config, LinearLlama3ForCausalLM, enable_sequence_tiling
from ...sequence_parallel.collectives import all_gather
from ...sequence_parallel.costs import LinkSpeed
from ...sequence_parallel.planner import Profile, aligned_groups
from ...sequence_parallel.planner.checks import check_output
from ...sequence_parallel.planner.profile import SUFFIXES, Bytes, Seconds
from ..command_line import Changes, RecipeFile, run, user_errors
from ..launched import launched_processes
from ..memory.account import memory_account
from ..memory.peak import allocated_peak
from ..recipes.build import build_config, load_tokenizer
from ..recipes.recipe import Recipe, load_recipe
from .groups import planner_model

DEPTHS = (1, 3)
SHORTEST = 64  # tokens of a micro-batch
REPEATS, LINK_REPEATS = 3, 9  # medians; messages are short and most sensitive to other work
SLOW = 1.0  # seconds; no longer micro-batches are measured after one that is slower
MESSAGES = (2**12, 2**17, 2**20, 2**22)  # bytes per rank
USABLE = 0.95  # share of a device's memory


class Sample(NamedTuple):
    """A measured micro-batch, forward and backward."""

    linear: int  # layers
    softmax: int
    lengths: list[int]
    seconds: float
    bytes: float  # at the peak, without weights and gradients


def measure_profile(recipe: Recipe, *, name: str) -> Profile:
    """Measure compute, memory and links on all processes of a launch at once; every process returns the profile."""
    if recipe.lora is not None:
        raise ValueError("a profile is of training all weights, got lora; leave it out of the profiled recipe")
    config = build_config(recipe, load_tokenizer(recipe))
    bench = Bench(recipe, config)
    samples = bench.samples(recipe.sequence_length)
    links = bench.links()
    settings, layers = recipe.training, config.num_hidden_layers
    fixed, per_layer, *seconds = fit_seconds(samples)
    beside, *bytes_ = fit_bytes(samples)
    sharded = bool(settings.get("fsdp"))
    account = memory_account(config, tokens=SHORTEST, dtype=bench.dtype, replicas=bench.world, gpu=False).lines
    parts = ["weights", "gradients", "optimizer"] + ([] if sharded else ["communication"])
    return Profile(
        name=name,
        origin="measured",
        source=f"linear-llama3 profile, {bench.world} processes at once, {datetime.datetime.now():%Y-%m-%d}; "
        f"models of {' and '.join(map(str, DEPTHS))} layers of each kind, micro-batches of {SHORTEST} to "
        f"{max(sum(s.lengths) for s in samples)} tokens; states of AdamW, computed; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, accelerate {accelerate.__version__}",
        hardware=hardware(bench.device),
        processes=bench.world,
        gradient_checkpointing=bench.recomputes,
        model=planner_model(config, bench.element),
        seconds=Seconds(micro_batch=fixed + layers * per_layer, **dict(zip(SECONDS, seconds, strict=True))),
        bytes=Bytes(
            device=bench.memory,
            states=sum(account[part] for part in parts) + beside,
            sharded=sharded,
            **dict(zip(BYTES, bytes_, strict=True)),
        ),
        links=links,
    )


SECONDS = ("token", "linear_token", "softmax_token", "softmax_square")
BYTES = ("token", "linear_token", "softmax_token")


def fit_seconds(samples: list[Sample]) -> list[float]:
    """Return the seconds of a micro-batch, of each of its layers, and the coefficients `SECONDS`."""
    columns = [
        (1, s.linear + s.softmax, n := sum(s.lengths), s.linear * n, s.softmax * n, s.softmax * _squares(s.lengths))
        for s in samples
    ]
    return non_negative_fit(np.array(columns, dtype=float), np.array([s.seconds for s in samples]))


def fit_bytes(samples: list[Sample]) -> list[float]:
    """Return the bytes of a micro-batch, and the coefficients `BYTES`."""
    columns = [(1, n := sum(s.lengths), s.linear * n, s.softmax * n) for s in samples]
    return non_negative_fit(np.array(columns, dtype=float), np.array([s.bytes for s in samples]))


def fit_link(degree: int, times: list[float]) -> LinkSpeed:
    """Fit latency and bandwidth to all-gathers of `MESSAGES`, in which each rank sends its message to all others."""
    sent = [(degree - 1) * size for size in MESSAGES]
    latency, slope = non_negative_fit(np.array([(1, n) for n in sent], dtype=float), np.array(times))
    if not slope:
        raise ValueError(
            f"all-gathers of {degree} ranks must take longer for {MESSAGES[-1]:,} bytes than for {MESSAGES[0]:,}, got "
            f"{', '.join(f'{seconds:.3g}' for seconds in times)} s; measure while nothing else runs"
        )
    return LinkSpeed(latency, 1 / slope)


def _squares(lengths: list[int]) -> int:
    return sum(length**2 for length in lengths)


def non_negative_fit(columns: NDArray[np.float64], values: NDArray[np.float64]) -> list[float]:
    """Minimize squared relative errors without negative coefficients: drop columns that would have one, the most
    negative first. scipy's nnls would be the only use of scipy at run time."""
    scales = columns.max(0)
    scaled, kept = columns / scales / values[:, None], list(range(columns.shape[1]))
    while True:
        found = np.linalg.lstsq(scaled[:, kept], np.ones(len(values)), rcond=None)[0]
        if found.min() >= 0:
            break
        del kept[int(found.argmin())]
    coefficients = np.zeros(columns.shape[1])
    coefficients[kept] = found / scales[kept]
    return coefficients.tolist()


class Bench:
    """Measurements by the processes of a launch, with the recipe's dtype, checkpointing and tiling."""

    def __init__(self, recipe: Recipe, config: LinearLlama3Config) -> None:
        training = recipe.training
        self.config, self.world = config, dist.get_world_size() if dist.is_initialized() else 1
        local = int(os.environ.get("LOCAL_RANK", "0"))
        gpu = torch.cuda.is_available() and not training.get("use_cpu", False)
        self.device = torch.device("cuda", local) if gpu else torch.device("cpu")
        self.dtype = getattr(torch, recipe.model.get("dtype", "float32"))
        half = torch.bfloat16 if training.get("bf16") else torch.float16 if training.get("fp16") else None
        self.autocast = half
        self.element = 2 if half else self.dtype.itemsize
        self.recomputes = any(training.get(f"{kind}_checkpointing") for kind in ("gradient", "activation"))
        self.tiles = bool(training.get("sequence_tiling"))
        self.bar: Any = None

    @property
    def memory(self) -> float:
        """Bytes of memory that a process may use."""
        if self.device.type == "cuda":
            return USABLE * torch.cuda.get_device_properties(self.device).total_memory
        return USABLE * psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", self.world))

    def samples(self, longest: int) -> list[Sample]:
        """Measure micro-batches of one document and of four, up to `longest` tokens or `SLOW` seconds."""
        totals = [SHORTEST << n for n in range((max(longest, 4 * SHORTEST) // SHORTEST).bit_length())]
        kinds = [(depth, 0) for depth in DEPTHS] + [(0, depth) for depth in DEPTHS]
        found = []
        with self._progress(2 * len(totals) * len(kinds), "layers"):
            for linear, softmax in kinds:
                model, seconds = self._model(linear, softmax), 0.0
                for total in totals:
                    for lengths in ([total], [total // 4] * 4):
                        self.bar.update()
                        if seconds < SLOW:
                            sample = self._sample(model, linear, softmax, lengths)
                            found.append(sample)
                    seconds = max(s.seconds for s in found[-2:])
        return found

    def _model(self, linear: int, softmax: int) -> LinearLlama3ForCausalLM:
        layers = ["linear_attention"] * linear + ["full_attention"] * softmax
        changes = {"num_hidden_layers": len(layers), "layer_types": layers, "full_attention_interval": None}
        model = LinearLlama3ForCausalLM(LinearLlama3Config.from_dict({**self.config.to_dict(), **changes}))
        enable_sequence_tiling(model, self.tiles)
        if self.recomputes:  # transformers before 5.23 has the older name
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return model.to(self.device, self.dtype).train()

    def _sample(self, model: LinearLlama3ForCausalLM, linear: int, softmax: int, lengths: list[int]) -> Sample:
        ids = torch.randint(self.config.vocab_size, (1, sum(lengths)), device=self.device)
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])[None]
        batch = {"input_ids": ids, "labels": ids, "position_ids": positions, "skip_logits": True}

        def step() -> None:
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                loss = model(**batch).loss
            loss.backward()

        step()  # compiles, and allocates the gradients
        seconds = self.timed(step, REPEATS)
        return Sample(linear, softmax, lengths, seconds, self._slowest(allocated_peak(step)))

    def timed(self, function: Callable[[], object], repeats: int) -> float:
        """Return the median of the slowest process's seconds."""
        times = []
        for _ in range(repeats):
            self._wait()
            start = time.perf_counter()
            function()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(self._slowest(time.perf_counter() - start))
        return float(np.median(times))

    def links(self) -> dict[int, LinkSpeed]:
        """Return the link of each degree; all groups of a degree gather at once, as in a step of one degree."""
        degrees = sorted({degree for degree, _ in aligned_groups(self.world)})
        found = {}
        with self._progress(len(degrees) * len(MESSAGES), "links"):
            for degree in degrees:
                groups = [dist.new_group([*range(f, f + d)]) for d, f in aligned_groups(self.world) if d == degree]
                own = dist.get_rank() // degree
                found[degree] = self._link(groups[own] if own < len(groups) else None, degree)
        return found

    def _link(self, group: dist.ProcessGroup | None, degree: int) -> LinkSpeed:
        times = []
        for size in MESSAGES:
            message = torch.zeros(size // 4, device=self.device)

            def gather(message: Tensor = message) -> None:
                if group is not None:
                    all_gather(message, group).wait()

            gather()
            times.append(self.timed(gather, LINK_REPEATS))
            self.bar.update()
        return fit_link(degree, times)

    def _wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def _slowest(self, value: float) -> float:
        if self.world == 1:
            return value
        shared = torch.tensor(float(value), device=self.device, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.item()

    @contextlib.contextmanager
    def _progress(self, total: int, what: str) -> Iterator[None]:
        first = not dist.is_initialized() or dist.get_rank() == 0
        with tqdm(total=total, desc=what, disable=not first) as self.bar:
            yield


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.machine()}, {os.cpu_count()} cores shared by all processes"


def _cpu_info() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def main(
    recipe_file: RecipeFile,
    output: Annotated[Path, typer.Argument(metavar="FILE.json", help="The file to write.")],
    changes: Changes = None,
) -> None:
    """Measure a profile in one of the processes of a launch."""
    with user_errors():
        check_output(output, SUFFIXES)
        recipe = load_recipe(recipe_file, changes or [])
        if launched_processes() > 1:
            gpu = torch.cuda.is_available() and not recipe.training.get("use_cpu", False)
            if gpu:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if gpu else "gloo")
        profile = measure_profile(recipe, name=output.stem)
    if not dist.is_initialized() or dist.get_rank() == 0:
        profile.save(output)
        print(f"profile: {output}")


if __name__ == "__main__":
    run(main)
