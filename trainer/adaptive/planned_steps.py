"""The steps of adaptive groups on one rank: planned, read and sharded while the previous step is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ...ops.cross_entropy import IGNORE_INDEX
from ...ops.documents import check_mask
from ...sequence_parallel import SequenceParallelConfig, SequenceParallelContext
from ...sequence_parallel.collectives import all_reduce
from ...sequence_parallel.planner import Cluster, Costs, StepPlan, aligned_groups, plan

GroupKey = tuple[int, int]  # degree, first rank
KEYS = ("input_ids", "labels", "position_ids", "attention_mask")
NAMED = 8  # rows in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMicroBatch:
    """A rank's part of one micro-batch."""

    group: GroupKey
    tokens: Tensor  # [1, n], all tokens of its group, compared between the group's ranks
    inputs: dict[str, Any]  # its shard of them


class PlannedStep(dict[str, Tensor]):
    """One optimizer step on a rank.

    As a dict it is a batch of the sequences whose groups begin with this rank. Trainer counts its tokens and FLOPs on
    every rank and adds them up, so each sequence counts once.

    Args:
        counted: that batch.
        micro_batches: this rank's part of every micro-batch.
        targets: number of targets in the parts of this rank.
        fingerprint: hash of the rows and groups of all ranks.
    """

    def __init__(
        self,
        counted: dict[str, Tensor],
        *,
        plan: StepPlan,
        micro_batches: tuple[RankMicroBatch, ...],
        targets: int,
        fingerprint: str,
    ) -> None:
        super().__init__(counted)
        self.plan, self.micro_batches, self.targets, self.fingerprint = plan, micro_batches, targets, fingerprint


def fingerprint(content: object) -> str:
    """Return a hash of an object's `repr`, the same in all processes."""
    return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()


def group_contexts(
    model: nn.Module, costs: Costs, layout: str, *, devices: int, timeout: float, device: torch.device
) -> dict[GroupKey, SequenceParallelContext]:
    """Return this rank's contexts: of at most log2 `devices` groups, and of itself alone. All ranks must call it.

    Args:
        costs: costs by degree, which name its strategies.
        timeout: seconds that a collective waits for other ranks.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    contexts = {(1, rank): SequenceParallelContext(None, SequenceParallelConfig(layout=layout))}
    for degree, first in aligned_groups(devices):
        if degree not in costs.by_degree:
            continue
        ranks = range(first, first + degree)
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout))
        if rank in ranks:
            all_reduce(
                torch.zeros(1, device=device), group
            ).wait()  # NCCL's first collective needs all ranks of a group
            own = costs.by_degree[degree]
            config = SequenceParallelConfig(
                **{kind: name for kind, name in (("linear", own.linear), ("softmax", own.softmax)) if name},
                layout=layout,
            )
            contexts[degree, first] = SequenceParallelContext(group, config)
    for context in contexts.values():
        context.resolve_layout(model)
    return contexts


class StepPlanner:
    """Turns the row numbers of a step into a `PlannedStep`. Only the rows of this rank's groups are read.

    Args:
        dataset: rows with `input_ids`.
        collate: turns a list of one row into a batch `[1, n]` with labels.

    Raises:
        ValueError: a row has no tokens, or more than any group can hold.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], dict[str, Any]],
        contexts: dict[GroupKey, SequenceParallelContext],
        *,
        cluster: Cluster,
        costs: Costs,
        rank: int,
    ) -> None:
        self.dataset, self.collate, self.contexts = dataset, collate, contexts
        self.cluster, self.costs, self.rank = cluster, costs, rank
        self.lengths = row_lengths(dataset, progress=rank == 0)
        _check_lengths(self.lengths, cluster, costs)

    def __call__(self, rows: Sequence[int]) -> PlannedStep:
        """Plan a step, or raise ValueError for rows that cannot be planned or packed."""
        return self.materialize(plan(self.lengths[rows].tolist(), self.cluster, self.costs), rows)

    def materialize(self, step: StepPlan, rows: Sequence[int]) -> PlannedStep:
        """Read and shard this rank's part of a plan for these rows."""
        lengths: list[int] = self.lengths[rows].tolist()
        micro_batches, led, targets = [], [], 0
        for group in step.for_rank(self.rank):
            key = group.degree, group.first_rank
            batch = pack_rows([self._read(rows[i], lengths[i]) for i in group.sequences])
            inputs = self.contexts[key].shard_batch(batch)
            targets += int((inputs["shift_labels"] != IGNORE_INDEX).sum())
            micro_batches.append(RankMicroBatch(group=key, tokens=batch["input_ids"], inputs=inputs))
            if group.first_rank == self.rank:
                led.append(batch)
        groups = [[(g.degree, g.first_rank, g.sequences) for g in batch.groups] for batch in step.micro_batches]
        counted = {"input_ids": torch.zeros(1, 0, dtype=torch.long)}
        if led:
            counted = {name: torch.cat([batch[name] for batch in led], dim=1) for name in ("input_ids", "position_ids")}
        return PlannedStep(
            {**counted, "attention_mask": torch.ones_like(counted["input_ids"])},  # no token is padding
            plan=step,
            micro_batches=tuple(micro_batches),
            targets=targets,
            fingerprint=fingerprint((list(rows), groups)),
        )

    def _read(self, row: int, length: int) -> dict[str, Tensor]:
        batch = dict(self.collate([self.dataset[row]]))
        _check_row(batch, row, length)
        return batch


def row_lengths(dataset: Any, *, progress: bool) -> NDArray[np.int64]:
    """Return the tokens of every row `[rows]`; for a `datasets.Dataset` without reading any."""
    if isinstance(dataset, datasets.Dataset):
        from pyarrow import compute

        stored = dataset.select_columns(["input_ids"])
        lengths = compute.list_value_length(stored.data.column("input_ids")).fill_null(0).to_numpy().astype(np.int64)
        order = stored._indices  # the stored rows that a shuffle, select or filter has left
        return lengths if order is None else lengths[order.column(0).to_numpy()]
    rows = tqdm(range(len(dataset)), desc="lengths of rows", delay=5, disable=not progress)
    return np.fromiter((len(dataset[row]["input_ids"]) for row in rows), np.int64, len(dataset))


def _check_lengths(lengths: NDArray[np.int64], cluster: Cluster, costs: Costs) -> None:
    """Raise ValueError for rows that `plan` would refuse in the step that draws them, perhaps hours later."""
    largest = max(costs.capacity(degree, cluster.memory) for degree in costs.by_degree if degree <= cluster.devices)
    wrong = np.flatnonzero((lengths < 1) | (lengths > largest))
    if len(wrong):
        named = [f"row {row} of {lengths[row]:,} tokens" for row in wrong[:NAMED].tolist()]
        raise ValueError(
            f"every row must have 1 to {largest:,} tokens (the largest group of {cluster} holds no more), got "
            f"{len(wrong):,} of {len(lengths):,} rows outside: {', '.join(named)}"
            f"{', ...' if len(wrong) > NAMED else ''}; remove or split them, set gradient_checkpointing=True "
            "(and measure a new profile with it), or train on more devices"
        )


def pack_rows(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate batches `[1, n]` of one or several documents each.

    The first token of a row is never a target. `position_ids` separate documents inside a row. The labels of their
    first tokens are up to the caller, as with a static degree.
    """
    labels = [batch["labels"].clone() for batch in batches]
    for own in labels:
        own[:, 0] = IGNORE_INDEX  # its predecessor belongs to another row
    positions = [batch.get("position_ids", torch.arange(batch["input_ids"].shape[1])[None]) for batch in batches]
    return {
        "input_ids": torch.cat([batch["input_ids"] for batch in batches], dim=1),
        "labels": torch.cat(labels, dim=1),
        "position_ids": torch.cat(positions, dim=1),
    }


def _check_row(batch: dict[str, Any], row: int, length: int) -> None:
    shapes = {key: tuple(x.shape) for key, x in batch.items() if isinstance(x, Tensor)}
    check_mask(batch.get("attention_mask"))
    padded = "attention_mask" in batch and not batch["attention_mask"].all()
    needed = {"input_ids", "labels"} <= shapes.keys() <= set(KEYS) and set(shapes.values()) == {(1, length)}
    if not needed or padded or int(batch.get("position_ids", torch.zeros(1, 1))[0, 0]):
        raise ValueError(
            "adaptive groups pack rows of input_ids, labels and optionally position_ids from 0 on and an "
            f"attention_mask of ones, without padding; got {shapes} of row {row}, whose length in the data is {length}"
            f"{', with zeros in its attention_mask' if padded else ''}; choose other columns or another data_collator"
        )


class Prefetcher:
    """Makes steps of an iterator's items in a thread, one item ahead."""

    def __init__(self, make: Callable[[Any], PlannedStep]) -> None:
        self._make, self._pool = make, ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._iterator: Iterator[Any] | None = None
        self._future: Future[PlannedStep] | None = None

    def next(self, iterator: Iterator[Any]) -> PlannedStep | None:
        """Return the next step, or None at the end of the iterator. Another iterator starts again."""
        if iterator is not self._iterator:
            self._iterator, self._future = iterator, self._start(iterator)
        if self._future is None:
            return None
        made = self._future.result()
        self._future = self._start(iterator)
        return made

    def _start(self, iterator: Iterator[Any]) -> Future[PlannedStep] | None:
        item = next(iterator, None)
        return None if item is None else self._pool.submit(self._make, item)
