"""The steps of adaptive groups on one rank: planned, read and cut while the step before is computed."""

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
class Portion:
    """What a rank does in one micro-batch."""

    group: GroupKey
    lengths: tuple[int, ...]  # of the sequences that its group shares
    tokens: Tensor  # [1, n] of them all, to be compared with those of the group's other ranks
    inputs: dict[str, Any]  # its part of them


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    plan: StepPlan
    portions: tuple[Portion, ...]  # one for each micro-batch
    tokens: int  # of all ranks
    targets: int  # of this rank
    fingerprint: str  # of the rows and groups of all ranks


def fingerprint(content: object) -> str:
    """Of what `repr` says of it, the same in all processes."""
    return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()


def group_contexts(
    model: nn.Module, costs: Costs, layout: str, *, devices: int, timeout: float, device: torch.device
) -> dict[GroupKey, SequenceParallelContext]:
    """This rank's contexts, of at most log2 `devices` groups and of itself alone. Every rank has to call it.

    Args:
        costs: name the strategies of each degree.
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
            all_reduce(torch.zeros(1, device=device), group).wait()  # NCCL's first exchange needs all of a group
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
    """Makes a `PlannedStep` of the numbers of a step's rows. Only the rows of this rank's groups are read.

    Args:
        dataset: rows with `input_ids`.
        collate: makes a batch `[1, n]` of a list of one row, with labels.

    Raises:
        ValueError: rows without tokens, or that no group holds.
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
        """ValueError for rows that cannot be planned, or that are not what a plan packs."""
        return self.realise(plan(self.lengths[rows].tolist(), self.cluster, self.costs), rows)

    def realise(self, step: StepPlan, rows: Sequence[int]) -> PlannedStep:
        """This rank's portions of a plan for these rows."""
        lengths: list[int] = self.lengths[rows].tolist()
        portions, targets = [], 0
        for group in step.for_rank(self.rank):
            key = group.degree, group.first_rank
            batch = pack_rows([self._read(rows[i], lengths[i]) for i in group.sequences])
            inputs = self.contexts[key].shard_batch(batch)
            targets += int((inputs["shift_labels"] != IGNORE_INDEX).sum())
            own = tuple(lengths[i] for i in group.sequences)
            portions.append(Portion(group=key, lengths=own, tokens=batch["input_ids"], inputs=inputs))
        groups = [[(g.degree, g.first_rank, g.sequences) for g in batch.groups] for batch in step.micro_batches]
        return PlannedStep(
            plan=step,
            portions=tuple(portions),
            tokens=sum(lengths),
            targets=targets,
            fingerprint=fingerprint((list(rows), groups)),
        )

    def _read(self, row: int, length: int) -> dict[str, Tensor]:
        batch = dict(self.collate([self.dataset[row]]))
        _check_row(batch, row, length)
        return batch


def row_lengths(dataset: Any, *, progress: bool) -> NDArray[np.int64]:
    """Tokens of every row `[rows]`; of a `datasets.Dataset` without reading a token."""
    if isinstance(dataset, datasets.Dataset):
        from pyarrow import compute

        stored = dataset.select_columns(["input_ids"])
        lengths = compute.list_value_length(stored.data.column("input_ids")).fill_null(0).to_numpy().astype(np.int64)
        order = stored._indices  # a table of the stored rows that are left, after a shuffle, select or filter
        return lengths if order is None else lengths[order.column(0).to_numpy()]
    rows = tqdm(range(len(dataset)), desc="lengths of rows", delay=5, disable=not progress)
    return np.fromiter((len(dataset[row]["input_ids"]) for row in rows), np.int64, len(dataset))


def _check_lengths(lengths: NDArray[np.int64], cluster: Cluster, costs: Costs) -> None:
    """What `plan` would refuse in the step that draws it, perhaps hours later."""
    largest = max(costs.capacity(degree, cluster.memory) for degree in costs.by_degree if degree <= cluster.devices)
    wrong = np.flatnonzero((lengths < 1) | (lengths > largest))
    if len(wrong):
        named = [f"row {row} of {lengths[row]:,} tokens" for row in wrong[:NAMED].tolist()]
        raise ValueError(
            f"every row must have 1 to {largest:,} tokens (the largest group of {cluster} holds no more), got "
            f"{len(wrong):,} of {len(lengths):,} rows that have not: {', '.join(named)}"
            f"{', ...' if len(wrong) > NAMED else ''}; leave them out or cut them, set gradient_checkpointing=True "
            "(with a profile of its own), or train on more devices"
        )


def pack_rows(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches `[1, n]` end to end, each a document or several.

    The first token of a row is nobody's target. Documents inside a row are told by its `position_ids`; that their first
    tokens are nobody's targets is up to its labels, as it is with one degree for all.
    """
    labels = [batch["labels"].clone() for batch in batches]
    for own in labels:
        own[:, 0] = IGNORE_INDEX  # what stands before belongs to another row
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
            "adaptive groups pack rows of input_ids, labels and, if need be, position_ids from 0 on and an "
            f"attention_mask of ones, without padding; got {shapes} of row {row}, whose length in the data is {length}"
            f"{', with zeros in its attention_mask' if padded else ''}; choose other columns or another data_collator"
        )


class OneAhead:
    """What a thread makes of an iterator's items, one item ahead of who asks."""

    def __init__(self, make: Callable[[Any], PlannedStep]) -> None:
        self._make, self._pool = make, ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._iterator: Iterator[Any] | None = None
        self._future: Future[PlannedStep] | None = None

    def next(self, iterator: Iterator[Any]) -> PlannedStep | None:
        """None at its end. Another iterator starts anew."""
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
