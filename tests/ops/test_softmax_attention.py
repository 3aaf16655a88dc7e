"""The block primitive: masks by rule, merging by log-sum-exp, and the kernels against each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from linear_llama3.ops import attention_kernels as kernels
from linear_llama3.ops.softmax_attention import BlockAttention, _merge, output_with_delta, softmax_attention
from linear_llama3.ops.visibility import Tile, Visibility

RULES = [
    Visibility(documents=(0, 20)),
    Visibility(documents=(0, 1, 2, 9, 20)),
    Visibility(documents=(0, 20), window=3),
    Visibility(documents=(0, 7, 20), window=5),
    Visibility(documents=(0, 20), causal=False),
    Visibility(documents=(0, 4, 11, 20), causal=False),
]


def visible(rule: Visibility) -> Tensor:
    """The definition, bool `[T, T]`."""
    i, j = torch.arange(20)[:, None], torch.arange(20)[None, :]
    document = torch.zeros(20, dtype=torch.int64)
    for edge in rule.documents[1:-1]:
        document[edge:] += 1
    mask = document[:, None] == document[None, :]
    if rule.causal:
        mask &= j <= i
    if rule.window is not None:
        mask &= i - j < rule.window
    return mask


@pytest.mark.parametrize("rule", RULES)
def test_rules_of_visibility(rule: Visibility) -> None:
    mask = visible(rule)
    for i in range(20):
        seen = mask[i].nonzero()
        assert (rule.first_key(i), rule.last_key(i)) == (int(seen[0]), int(seen[-1]))
    spans = [(a, b) for a, b in itertools.product(range(0, 21, 3), repeat=2) if a <= b]
    for queries, keys in itertools.product(spans, repeat=2):
        block = mask[slice(*queries), slice(*keys)]
        assert rule.sees(queries, keys) == bool(block.any())
        covered = torch.zeros(20, 20, dtype=torch.int64)
        for tile in rule.tiles(queries, keys):
            place = tile.slices(0, 0)
            assert not tile.causal or place[0] == place[1]  # fused operators align the mask of a square alike
            seen = tile.mask(torch.zeros_like(covered[place], dtype=torch.float64)).isfinite()
            if tile.window is not None:
                assert (tile.hidden(seen.device) is None) == bool(seen.all())
            covered[place] += seen
        assert torch.equal(covered[slice(*queries), slice(*keys)], block.long())


def test_merging_far_apart_and_nothing() -> None:
    """lse 100 apart in float32 (exp overflows), nothing on one side, nothing on both."""
    lse = torch.tensor([[[100.0, 0.0, -torch.inf, 3.0, -torch.inf]]])
    other_lse = torch.tensor([[[0.0, 100.0, 2.0, -torch.inf, -torch.inf]]])
    out, other = torch.ones(1, 1, 5, 2), torch.full((1, 1, 5, 2), 5.0)
    out[..., (2, 4), :] = 0
    _merge(out, lse, other, other_lse)
    assert lse.tolist() == [[[100.0, 100.0, 2.0, 3.0, -torch.inf]]]
    assert out[0, 0, :, 0].tolist() == [1.0, 5.0, 5.0, 1.0, 0.0]


def test_a_row_that_sees_nothing_has_no_weight() -> None:
    """The fused operator reports lse 0 for it, which would count in a merge."""
    rule = Visibility(documents=(0, 20), window=3)
    q, k = torch.rand(1, 4, 2, 8), torch.rand(1, 4, 2, 8)
    block = BlockAttention(q, [(8, 12)], value_dim=8, scale=1.0, visibility=rule)
    block.add(k, k, [(5, 9)])  # query 11 sees 9, 10, 11 only
    out, lse = block.result()
    assert lse[0, :, 3].tolist() == [-torch.inf] * 2 and out[0, 3].abs().max() == 0
    assert bool(torch.isfinite(lse[0, :, :3]).all())


@pytest.mark.parametrize(
    "tile",
    [
        Tile(q_start=0, q_stop=6, k_start=0, k_stop=6, causal=True),
        Tile(q_start=9, q_stop=15, k_start=0, k_stop=6),
        Tile(q_start=6, q_stop=12, k_start=2, k_stop=8, window=5),
    ],
    ids=["causal", "full", "window"],
)
def test_fused_and_plain_kernels_agree(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8), (2, 4, 6, 8))
    q, k, v, d_out = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    out, lse = kernels.attend(q, k, v, tile, 0.3)
    seen = torch.where(lse == -torch.inf, torch.inf, lse)
    gradients = kernels.attend_backward(q, k, v, out, seen, d_out, tile, 0.3)
    monkeypatch.setattr(kernels, "_flash_on_cpu", lambda q, v: False)
    for got, expected in zip(kernels.attend(q, k, v, tile, 0.3), (out, lse), strict=True):
        assert torch.allclose(got, expected, atol=1e-12)
    for got, expected in zip(kernels.attend_backward(q, k, v, out, seen, d_out, tile, 0.3), gradients, strict=True):
        assert torch.allclose(got, expected, atol=1e-12)


def test_out_is_needed_only_for_delta() -> None:
    d_out = torch.randn(3, 7, 5, dtype=torch.float64)
    d_out[0, 0] = 0
    d_out[0, 1] *= 1e-200
    delta = (d_out * torch.randn(3, 7, 5, dtype=torch.float64)).sum(-1)
    stand_in = output_with_delta(d_out, delta)
    assert torch.allclose((d_out * stand_in).sum(-1), delta, rtol=1e-14, atol=0)
    assert bool(torch.isfinite(stand_in).all())


def test_cuda_operators_take_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU only the shapes and types of the calls can be checked (on torch's meta device)."""
    monkeypatch.setattr(kernels, "_flash_on_cuda", lambda q, v: True)
    tile = Tile(q_start=0, q_stop=6, k_start=0, k_stop=6, causal=True)
    q, d_out = (torch.empty(2, 6, 4, 64, device="meta", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    k, v = (torch.empty(2, 6, 2, 64, device="meta", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    out, lse = kernels.attend(q, k, v, tile, 0.3)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
    gradients = kernels.attend_backward(q, k, v, out.float(), lse, d_out.float(), tile, 0.3)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [((8, 0), None, True), ((9, 0), None, True), ((7, 5), None, False), ((9, 4), "6.4", False)],
    ids=["ampere", "hopper", "turing", "rocm"],
)
def test_the_cuda_flash_operator_is_used_where_it_exists(
    capability: tuple[int, int], hip: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with FakeTensorMode():
        x = torch.empty(1, 2, 6, 64, device="cuda", dtype=torch.bfloat16)
    assert kernels._flash_on_cuda(x, x) is expected
    assert kernels.operand_dtype(x, x) is (torch.bfloat16 if expected else torch.float32)


def test_inputs_of_any_stride() -> None:
    """The CPU operator reads past a last dim that is not dense."""
    rule = Visibility(documents=(0, 20), window=7)
    wide = [torch.randn(2, 20, 2, 16, dtype=torch.float64)[..., ::2].requires_grad_() for _ in range(4)]
    turned = [torch.randn(2, 20, 8, 2, dtype=torch.float64).transpose(2, 3).requires_grad_() for _ in range(4)]
    for *inputs, d_out in (wide, turned):
        dense = [x.detach().contiguous().requires_grad_() for x in inputs]
        for visibility in (rule, RULES[0]):
            out, expected = (softmax_attention(*x, scale=0.3, visibility=visibility) for x in (inputs, dense))
            assert torch.equal(out, expected)
            gradients = (torch.autograd.grad(y, x, d_out) for y, x in ((out, inputs), (expected, dense)))
            assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
