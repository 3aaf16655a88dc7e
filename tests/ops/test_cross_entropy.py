"""The cross-entropy without logits is that of its definition, with its gradients, and holds no logits of all tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from linear_llama3.ops import token_tiles
from linear_llama3.ops.cross_entropy import IGNORE_INDEX, chunked_cross_entropy
from tests.helpers.allocations import Made

VOCAB, DIM = 37, 8


@pytest.fixture(autouse=True)
def chunks_of_five_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_tiles, "TILE_NUMBERS", 5 * VOCAB)


def inputs(dtype: torch.dtype = torch.float64, tokens: int = 23) -> tuple[Tensor, Tensor]:
    """Hidden states `[2, T, DIM]` and targets; the first row begins without any, in the middle of a chunk."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(2, tokens, DIM, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCAB, (2, tokens), generator=generator)
    targets[0, :7] = targets[1, 3] = IGNORE_INDEX
    return hidden_states.requires_grad_(), targets


def head(dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(DIM, VOCAB, bias=bias, dtype=torch.float64).to(dtype)


def definition(hidden_states: Tensor, targets: Tensor, layer: nn.Module) -> Tensor:
    """- log softmax(z)_y, token after token, in float64."""
    total = hidden_states.new_zeros((), dtype=torch.float64)
    for x, y in zip(hidden_states.flatten(0, 1), targets.flatten().tolist(), strict=True):
        if y != IGNORE_INDEX:
            z = layer(x.double())
            total = total - (z[y] - z.exp().sum().log())
    return total


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_the_definition(dtype: torch.dtype, bound: float, bias: bool) -> None:
    (x, y), layer = inputs(dtype), head(dtype, bias)
    loss = chunked_cross_entropy(x, y, layer, vocab_size=VOCAB)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    got = gradients(3 * loss, x, *layer.parameters())
    exact, precise = x.detach().double().requires_grad_(), head().to(dtype).double()
    if not bias:
        precise = nn.Linear(DIM, VOCAB, bias=False, dtype=torch.float64)
        precise.weight.data = layer.weight.detach().double()
    expected_loss = definition(exact, y, precise)
    assert abs(loss.item() / expected_loss.item() - 1) < bound
    for a, b in zip(got, gradients(3 * expected_loss, exact, *precise.parameters()), strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert ((a - b).norm() / b.norm()).item() < bound


def test_gradients_of_the_weights_are_summed_in_float32() -> None:
    """Over 460 chunks, sums in bfloat16 would be off by several percent."""
    token_tiles.TILE_NUMBERS = VOCAB
    (x, y), layer = inputs(torch.bfloat16, tokens=230), head(torch.bfloat16, bias=False)
    (got,) = gradients(chunked_cross_entropy(x, y, layer, vocab_size=VOCAB), layer.weight)
    precise = nn.Linear(DIM, VOCAB, bias=False, dtype=torch.float64)
    precise.weight.data = layer.weight.detach().double()
    (expected,) = gradients(definition(x.detach(), y, precise), precise.weight)
    assert ((got - expected).norm() / expected.norm()).item() < 4e-3


def test_no_logits_of_all_tokens() -> None:
    (x, y), layer = inputs(), head()
    with Made() as made:
        chunked_cross_entropy(x, y, layer, vocab_size=VOCAB).backward()
    assert made.largest() == max(x.numel(), layer.weight.numel()) > 5 * VOCAB
    logits = [s for s in made.shapes if len(s) == 2 and s[1] == VOCAB and s[0] != DIM]  # not the weights' gradient
    assert (5, VOCAB) in logits and all(tokens <= 5 for tokens, _ in logits)


def test_a_frozen_head_has_no_gradient_computed() -> None:
    (x, y), layer = inputs(), head().requires_grad_(False)
    with Made() as made:
        loss = chunked_cross_entropy(x, y, layer, vocab_size=VOCAB)
        (got,) = gradients(loss, x)
    assert made.shapes.count((VOCAB, DIM)) == 0 and layer.weight.grad is None
    torch.testing.assert_close(got, gradients(definition(x, y, layer), x)[0], rtol=0, atol=1e-13)


def test_a_head_alone_can_be_trained() -> None:
    (x, y), layer = inputs(), head()
    got = gradients(chunked_cross_entropy(x.detach(), y, layer, vocab_size=VOCAB), *layer.parameters())
    torch.testing.assert_close(got, gradients(definition(x.detach(), y, layer), *layer.parameters()))


def test_without_a_target_loss_and_gradients_are_zero() -> None:
    """A rank may hold none; its parameters still take part."""
    (x, y), layer = inputs(), head()
    loss = chunked_cross_entropy(x, torch.full_like(y, IGNORE_INDEX), layer, vocab_size=VOCAB)
    assert loss.item() == 0
    for gradient in gradients(loss, x, *layer.parameters()):
        assert gradient.abs().max() == 0


def test_evaluation_computes_no_gradients() -> None:
    (x, y), layer = inputs(), head()
    with torch.no_grad(), Made() as made:
        loss = chunked_cross_entropy(x, y, layer, vocab_size=VOCAB)
    assert not loss.requires_grad and (VOCAB, DIM) not in made.shapes and tuple(x.shape) not in made.shapes
    assert abs(loss.item() - definition(x, y, layer).item()) < 1e-12


def test_the_graph_can_be_kept_and_hooks_see_complete_gradients() -> None:
    (x, y), layer, seen = inputs(), head(), []
    layer.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    loss = chunked_cross_entropy(x, y, layer, vocab_size=VOCAB)
    loss.backward(retain_graph=True)
    assert layer.weight.grad is not None
    once = layer.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(layer.weight.grad, 2 * once, rtol=0, atol=0)
    assert len(seen) == 2 and torch.equal(seen[0], once)


def test_autocast() -> None:
    """Logits are in bfloat16, as with the head alone; what is summed is in float32."""
    (x, y), layer = inputs(torch.float32), head(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(x, y, layer, vocab_size=VOCAB)
        logits = layer(x)
        plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="sum")
    assert logits.dtype == torch.bfloat16 and abs(loss.item() / plain.item() - 1) < 1e-6
    for a, b in zip(gradients(loss, x, *layer.parameters()), gradients(plain, x, *layer.parameters()), strict=True):
        assert a.dtype == torch.float32 and ((a - b).norm() / b.norm()).item() < 5e-3


class Adapted(nn.Module):
    """A layer like LoRA's: a frozen head, and a product of two thin matrices behind a dropout."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = (nn.Parameter(torch.randn(*shape).to(base.weight)) for shape in ((DIM, 2), (2, VOCAB)))
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b if self.on else self.base(x)


def test_any_head_that_maps_tokens() -> None:
    (x, y), layer = inputs(), Adapted(head())
    got = gradients(chunked_cross_entropy(x, y, layer, vocab_size=VOCAB), x, layer.a, layer.b)
    torch.testing.assert_close(got, gradients(definition(x, y, layer), x, layer.a, layer.b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_parameters_that_take_no_part(needs_gradient: bool) -> None:
    (x, y), layer = inputs(), Adapted(head())
    layer.on = False
    x = x.detach().requires_grad_(needs_gradient)
    loss = chunked_cross_entropy(x, y, layer, vocab_size=VOCAB)
    loss.backward()
    assert abs(loss.item() - definition(x, y, layer).item()) < 1e-12
    assert layer.a.grad is not None and layer.a.grad.abs().max() == 0
    if needs_gradient:
        torch.testing.assert_close(x.grad, gradients(definition(x, y, layer), x)[0], rtol=0, atol=1e-13)
