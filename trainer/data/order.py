"""The rows of a step on any grid of processes, on which exact resumes rest.

A step consists of the next `rows_per_step` rows of the sampler's order or of the stream, spread over the processes.
So the position in the data is the number of rows consumed, and a resume on another grid continues from it, provided
that the order and the rows of a step are the same.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.trainer_utils import has_length

from ...ops.cross_entropy import IGNORE_INDEX
from ..checkpoints.manifest import ResumeError

logger = logging.getLogger(__name__)


class CompleteSteps(IterableDataset):
    """A stream without the last rows of a pass if they do not fill a step.

    Trainer would accumulate their gradients into the first step of the next pass. accelerate distributes this dataset
    row by row, and a `datasets` stream file by file, in an order that depends on the number of processes.
    """

    def __init__(self, rows: Any, rows_per_step: int) -> None:
        self.rows, self.rows_per_step = rows, rows_per_step

    def __iter__(self) -> Iterator[Any]:
        rows, complete = iter(self.rows), False
        while len(step := list(islice(rows, self.rows_per_step))) == self.rows_per_step:
            yield from step
            complete = True
        if not complete and (step or get_worker_info() is None):  # a loader worker may have no file of the stream
            raise ValueError(
                f"a stream must hold the rows of a step, {self.rows_per_step}, got {len(step)}; add data, or lower "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        if step:
            logger.info("the last %d rows of a pass do not fill a step and are skipped", len(step))

    def __len__(self) -> int:
        """Return the number of rows, or raise TypeError if the stream has no length."""
        return len(self.rows) // self.rows_per_step * self.rows_per_step

    def __getattr__(self, name: str) -> Any:
        if name == "rows":  # not set yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.rows, name)  # set_epoch, generator


def data_order(
    loader: DataLoader, *, rows_per_step: int, rows_per_batch: int, drop_last: bool, content: str | None
) -> dict[str, Any]:
    """Return facts that must stay the same for a resume to continue at the position where the run stopped.

    `rows_per_epoch` is None for a stream without a length. `workers` is [number, rows in a batch of all processes] of
    several loader workers, which read a stream in turns.

    Args:
        loader: a prepared loader.
        rows_per_batch: rows in one batch of all processes together.
        content: a `content_hash`.
    """
    order = {"rows_per_step": rows_per_step, "content": content}
    dataset: Any = loader.dataset
    if isinstance(loader.dataset, IterableDataset):
        rows = len(dataset) if has_length(dataset) else None
        workers = [loader.num_workers, rows_per_batch] if loader.num_workers > 1 else None
        return {**order, "rows_per_epoch": rows, "sampler": "stream", "seed": None, "workers": workers}
    sampler = _sampler(loader)
    rows = len(sampler) // rows_per_batch * rows_per_batch if drop_last else len(sampler)
    seed = getattr(sampler, "initial_seed", None)
    return {**order, "rows_per_epoch": rows, "sampler": type(sampler).__name__, "seed": seed, "workers": None}


def check_order(order: dict[str, Any], saved: dict[str, Any], *, accumulation: int) -> None:
    """Raise ResumeError unless the `data_order` of this launch is the one that a checkpoint holds.

    Args:
        accumulation: this launch's gradient_accumulation_steps.
    """
    restart = "set ignore_data_skip=True to start the epoch's data again"
    steps = saved["rows_per_step"] * accumulation / order["rows_per_step"]
    remedies = {
        "rows_per_step": f"set gradient_accumulation_steps={steps:g}"
        if steps.is_integer()
        else "choose per_device_train_batch_size and gradient_accumulation_steps that give it",
        "rows_per_epoch": "train on the same data, with dataloader_drop_last=False",
        "sampler": "use the same train_sampling_strategy and kind of data",
        "seed": "set the same data_seed, or seed",
        "content": "train on the same data, cut into rows in the same way",
        "workers": "use the same dataloader_num_workers and batch size (or one worker, from the start)",
    }
    for name, remedy in remedies.items():
        if (before := saved.get(name)) != order[name]:
            raise ResumeError(
                f"a resumed run needs the {name} that it had, {before}, got {order[name]}; {remedy}, or {restart}"
            )
    if order["sampler"] in _NOT_REPEATABLE:
        raise ResumeError(
            f"a resumed run needs an order of the rows that a seed repeats, got a {order['sampler']}; use "
            "train_sampling_strategy 'random' (with accelerate's seedable sampler, the default) or 'sequential', "
            f"or {restart}"
        )


def content_hash(rows: Any) -> str | None:
    """Return a hash of some rows of a stored `datasets.Dataset`, or of a recipe's stream settings, else None."""
    if isinstance(rows, datasets.IterableDataset):
        return rows.info.description or None
    if not isinstance(rows, datasets.Dataset) or rows.format["type"] == "custom" or not len(rows):
        return None  # a transform may be random
    some = rows.with_format(None)[sorted({i * (len(rows) - 1) // 15 for i in range(16)})]
    return hashlib.blake2b(repr(sorted(some.items())).encode(), digest_size=8).hexdigest()


_NOT_REPEATABLE = ("LengthGroupedSampler", "BatchRebalanceSampler", "RandomSampler")


def _sampler(loader: DataLoader) -> Any:
    sampler: Any = loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return getattr(sampler, "sampler", sampler)


def repeated_rows(loader: DataLoader) -> tuple[int, int]:
    """Return this process's rows in a batch, and the number of repeated ones in the last batch of an epoch.

    accelerate fills the last batches with the epoch's first rows, so that all processes have the same number. (0, 0) on
    all processes if no row is repeated.
    """
    shard = loader.batch_sampler
    if not isinstance(shard, BatchSamplerShard) or not shard.even_batches or shard.drop_last or not shard.batch_size:
        return 0, 0
    own = shard.batch_size // shard.num_processes if shard.split_batches else shard.batch_size
    left = len(_sampler(loader)) % (own * shard.num_processes)
    real = min(max(left - own * shard.process_index, 0), own)
    return (own, own - real) if left else (0, 0)


def without_labels(batch: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return the batch with labels removed from its last `rows` rows."""
    batch = dict(batch)
    for name in ("labels", "shift_labels"):
        if name in batch:
            labels = batch[name].clone()
            labels[len(labels) - rows :] = IGNORE_INDEX
            batch[name] = labels
    return batch
