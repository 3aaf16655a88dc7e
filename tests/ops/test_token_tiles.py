"""Tiles of a sequence compute the result of the complete sequence, and keep only its inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from linear_llama3.ops import token_tiles
from linear_llama3.ops.token_tiles import in_tiles, tile_tokens


def test_tiles_hold_complete_blocks_of_128_tokens() -> None:
    assert tile_tokens(8192) == 16384 and tile_tokens(14336) == 9344 and tile_tokens(128256) == 1024


@pytest.mark.parametrize("tokens", [3, 7, 22])
def test_tiles_equal_one_pass(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tokens fit a tile: two rows of three, and one left over."""
    monkeypatch.setattr(token_tiles, "TILE_NUMBERS", 7 * 10)
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Dropout(0.5), nn.Linear(10, 4)).double()
    x, y = (torch.randn(2, tokens, 4, dtype=torch.float64, requires_grad=True) for _ in "xy")

    def function(x: Tensor, y: Tensor) -> Tensor:
        return x + layer(y)

    def run(attend: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        out = attend(x, y)
        return out, *torch.autograd.grad(out.square().sum(), (x, y, *layer.parameters()))

    def by_hand(x: Tensor, y: Tensor) -> Tensor:  # dropout takes its numbers tile by tile
        return torch.cat([function(x[:, a : a + 3], y[:, a : a + 3]) for a in range(0, tokens, 3)], dim=1)

    for got, expected in zip(run(lambda *xs: in_tiles(function, *xs, width=10)), run(by_hand), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_only_the_inputs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 4))
    x = torch.randn(1, 50, 4, requires_grad=True)
    for size, kept in ((100, {4, 10}), (5, {4})):  # at once, and in tiles
        monkeypatch.setattr(token_tiles, "TILE_NUMBERS", size * 10)
        widths: set[int] = set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, widths=widths: widths.add(t.shape[-1]) or t,  # type: ignore[misc]
            lambda t: t,
        ):
            in_tiles(layer, x, width=10)
        assert widths & {4, 10} == kept
