"""The final state of a sharded sequence and the tokens of all ranks, gathered on one rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from linear_llama3.ops import linear_attention as one_device
from linear_llama3.sequence_parallel import LAYOUTS, LINEAR_STRATEGIES, shard, start_linear_attention
from linear_llama3.sequence_parallel.gather import gather_to_rank, send_final_state
from scripts.traffic import Traffic
from tests.helpers.attention_cases import GATES, Case, relative_error, shards
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed, strided_group

States = list[np.ndarray]


def cases(gate: str, dtype: torch.dtype) -> list[Case]:
    """A single token, fewer tokens than ranks, odd lengths."""
    return [
        Case(tokens=t, gate=gate, batch=2, groups=2, normalize=normalize, strength=0.1, dtype=dtype)
        for t, normalize in ((1, False), (3, True), (24, False), (37, True), (37, False))
    ]


def final_states(all_cases: list[Case], strategy: str, layout: str, backend: str) -> States:
    """Return the state after this rank's last chunk, for every case."""
    results = []
    for case in all_cases:
        local = shards(case.inputs(), layout=layout)
        started = start_linear_attention(
            local["k"],
            local["v"],
            group=dist.group.WORLD,
            strategy=strategy,
            layout=layout,
            log_decay=local.get("log_decay"),
            normalize=case.normalize,
            length=case.tokens,
            backend=backend,
            output_final_state=True,
        )
        started(local["q"])
        assert started.final_state is not None
        results.append(started.final_state.numpy())
    return results


def state_after(case: Case, tokens: int) -> Tensor:
    inputs = {name: x.double() for name, x in case.inputs().items() if name != "w"}
    inputs = {name: x if x.dim() == 1 else x[:, :tokens] for name, x in inputs.items()}
    state = one_device(**inputs, normalize=case.normalize, output_final_state=True, backend="recurrent")[1]
    assert state is not None
    return state


def check(by_rank: list[States], all_cases: list[Case], layout: str, bound: float) -> None:
    ranks = len(by_rank)
    rule = LAYOUTS[layout]
    for i, case in enumerate(all_cases):
        padded = rule.padded(case.tokens, ranks)
        for rank, results in enumerate(by_rank):
            behind = rule.spans(rank, ranks, case.tokens, padded)[-1][1]
            expected = state_after(case, behind)
            assert results[i].shape == expected.shape
            assert relative_error(results[i], expected) < bound, (rank, case)


@slow_unless(
    lambda ranks, gate, layout: ranks in (1, 3) and gate == "channel",
    ranks=(1, 2, 3, 4), gate=GATES, layout=LAYOUTS,
)  # fmt: skip
def test_final_state(ranks: int, gate: str, layout: str) -> None:
    """Every rank has the state of the recurrence after its last token."""
    for strategy in LINEAR_STRATEGIES:
        all_cases = cases(gate, torch.float64)
        by_rank = run_distributed(final_states, ranks, all_cases, strategy, layout, "chunked")
        check(by_rank, all_cases, layout if ranks > 1 else "contiguous", 1e-12)


@slow_unless(lambda gate, layout: gate == "scalar" and layout == "zigzag", gate=GATES, layout=LAYOUTS)
def test_final_state_of_the_kernels(gate: str, layout: str) -> None:
    """D_k 5 and D_v 3 are padded inside; the state has none of it."""
    strategy = dict(zip(GATES, LINEAR_STRATEGIES, strict=True))[gate]  # every strategy once
    launch = pytest.importorskip("linear_llama3.ops.triton.launch")
    if not launch.INTERPRETED:
        pytest.skip("gloo shares tensors of the CPU")
    all_cases = cases(gate, torch.float32)
    check(run_distributed(final_states, 3, all_cases, strategy, layout, "triton"), all_cases, layout, 1e-5)


def gathered(layout: str, length: int, strided: bool) -> list[bool]:
    """For every destination: whether it, and only it, has the complete sequence and what the last rank holds."""
    group = strided_group() if strided else dist.group.WORLD
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    complete = torch.arange(2 * 3 * length * 2).reshape(2, 3, length, 2) + 100 * (dist.get_rank() % 2 if strided else 0)
    part = shard(complete, group=group, dim=2, layout=layout, padding=-1)
    where: dict[str, Any] = {"group": group, "layout": layout}
    last = 0 if layout == "zigzag" else ranks - 1
    right = []
    for dst in range(ranks):
        with Traffic() as traffic:
            x = gather_to_rank(part, dst=dst, length=length, dim=2, **where)
            end = send_final_state(torch.tensor([rank]), dst=dst, **where)
        sent = (rank != dst) * part.numel() * 8 + (rank == last != dst) * 8
        if rank == dst:
            right.append(x is not None and torch.equal(x, complete) and end is not None and end.item() == last)
        else:
            right.append(x is None and end is None)
        right.append(traffic.bytes == sent)
    return right


@slow_unless(
    lambda ranks, strided, layout: ranks == 4 and (strided or layout == "zigzag"),
    ranks=(2, 3, 4), strided=(False, True), layout=LAYOUTS,
)  # fmt: skip
def test_one_rank_gets_everything(ranks: int, strided: bool, layout: str) -> None:
    """And every other one sends its own tokens once."""
    if strided and ranks != 4:
        pytest.skip("four ranks make two strided groups")
    for length in (1, 3, 16, 21):
        for right in run_distributed(gathered, ranks, layout, length, strided):
            assert all(right)


def test_one_rank_alone_keeps_what_it_has() -> None:
    x = torch.rand(2, 7, 3)
    gathered = gather_to_rank(x, group=None, dst=0, length=5)
    assert gathered is not None and torch.equal(gathered, x[:, :5])
    assert send_final_state(x, group=None, dst=0, layout="zigzag") is x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, "every row is one causal sequence, got cu_seqlens; leave it out"),
        ({"causal": False}, "got causal=False; leave it out"),
        ({"exchange_cache": {}}, "got an exchange_cache; leave it out"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    k = torch.rand(1, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        start_linear_attention(k, k, group=None, output_final_state=True, **options)


def test_a_gradient_is_refused() -> None:
    k = torch.rand(1, 4, 2, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"has no gradient, got inputs that need one; use torch.no_grad\(\)"):
        start_linear_attention(k.detach(), k, group=None, output_final_state=True)
    with torch.no_grad():
        started = start_linear_attention(k, k, group=None, output_final_state=True)
        started(k)
    assert started.final_state is not None
