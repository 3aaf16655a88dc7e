"""The chunked loss equals the loss with logits, for every way to train the head.

transformers computes the latter in float32, from logits in any precision.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from linear_llama3 import LinearLlama3ForMaskedLM
from linear_llama3.modeling import enable_sequence_tiling
from linear_llama3.ops import token_tiles
from tests.helpers.allocations import Made
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import VOCAB, gradients, tiny_config, tiny_model, tokens


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_tiles, "TILE_NUMBERS", 5 * VOCAB)  # 5 tokens of the head, 6 of the MLP


def batch(length: int = 14) -> dict[str, Tensor]:
    ids = tokens(2, length)
    labels = ids.clone()
    labels[0, :9] = labels[1, 3] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**inputs, **options)
    assert (out.logits is None) == options.get("skip_logits", False)
    out.loss.backward()
    return out.loss.item(), gradients(model)


def assert_equal(model: Any, inputs: dict[str, Any], tolerance: float = 2e-6) -> dict[str, Tensor]:
    plain, d_plain = loss_and_gradients(model, inputs)
    chunked, d_chunked = loss_and_gradients(model, inputs, skip_logits=True)
    assert chunked == pytest.approx(plain, rel=tolerance)
    assert d_plain.keys() == d_chunked.keys() and d_plain
    for name, expected in d_plain.items():
        assert (d_chunked[name] - expected).norm() <= tolerance * max(expected.norm().item(), 1e-3), name
    return d_chunked


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}, {"ignore_index": 5}, {"shifted": True}],
    ids=["mean", "sum", "sum, tensor", "ignore_index", "shift_labels"],
)
def test_loss_and_gradients_equal_those_with_logits(options: dict[str, Any], tied: bool) -> None:
    inputs: dict[str, Any] = {**batch(), **options}
    if inputs.pop("shifted", False):
        inputs["shift_labels"] = inputs["labels"].roll(3, dims=1)  # other targets than the labels' own
    if "ignore_index" in options:
        inputs["labels"] = inputs["labels"].where(inputs["labels"] != -100, 5)
    assert_equal(tiny_model(tie_word_embeddings=tied).double().train(), inputs)


def test_the_chunked_loss_under_autocast() -> None:
    model = tiny_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(model, batch(), tolerance=2e-2)


def test_the_chunked_loss_with_a_frozen_head() -> None:
    model = tiny_model().double().train()
    model.lm_head.requires_grad_(False)
    assert "lm_head.weight" not in assert_equal(model, batch())


@pytest.mark.parametrize("kind", ["adapter", "adapter, switched off", "saved copy"])
def test_the_chunked_loss_with_lora_on_the_head(kind: str) -> None:
    peft = pytest.importorskip("peft")
    complete = ["lm_head"] if kind == "saved copy" else None
    targets = ["q_proj"] if complete else ["q_proj", "lm_head"]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=complete, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), config).double().train()
    if "off" in kind:
        with model.disable_adapter():
            assert model(**batch(), skip_logits=True).loss.item() == pytest.approx(model(**batch()).loss.item())
    else:
        assert any("lm_head" in name for name in assert_equal(model, batch()))


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 7}], ids=["mean", "sum"])
def test_the_chunked_loss_of_a_masked_language_model(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = tiny_config("basic", is_causal=False, initializer_range=0.3)
    assert_equal(LinearLlama3ForMaskedLM(config).double().train(), {**batch(), **options})


def test_without_labels_the_mean_is_nan_and_the_sum_zero_as_with_logits() -> None:
    model, inputs = tiny_model(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert model(**inputs, skip_logits=True).loss.isnan() and model(**inputs).loss.isnan()
    assert model(**inputs, num_items_in_batch=3, skip_logits=True).loss == 0


def test_skip_logits_without_a_loss_is_refused() -> None:
    model, inputs = tiny_model(), batch()
    with pytest.raises(ValueError, match="got no labels"):
        model(inputs["input_ids"], skip_logits=True)
    with pytest.raises(ValueError, match="got logits_to_keep=2"):
        model(**inputs, skip_logits=True, logits_to_keep=2)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    with pytest.raises(ValueError, match="got a model with the loss function"):
        model(**inputs, skip_logits=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_tensor_has_tokens_times_vocabulary_or_tokens_squared_elements(
    packed: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both layer kinds, forward and backward."""
    length, vocab_size = 512, 600
    monkeypatch.setattr(token_tiles, "TILE_NUMBERS", 100 * vocab_size)
    model = tiny_model("basic", vocab_size=vocab_size).train()
    enable_sequence_tiling(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs: dict[str, Any] = {"input_ids": tokens(1, length), "labels": tokens(1, length)}
    if packed:
        inputs["cu_seq_lens_q"] = torch.tensor([0, 200, length], dtype=torch.int32)
    with Made() as made:
        model(**inputs, skip_logits=True).loss.backward()
    assert made.largest() < length * length / 2
    assert max(len(shape) and shape[0] for shape in made.shapes if shape[-1:] == (vocab_size,)) <= 100


def fsdp_run(tied: bool, head_apart: bool, mixed: bool, skip_logits: bool) -> tuple[float, dict[str, Any]]:
    """Return loss and gradients of a rank's row under FSDP2; `head_apart`: the head is its own FSDP group."""
    token_tiles.TILE_NUMBERS, default = 5 * VOCAB, token_tiles.TILE_NUMBERS
    model = tiny_model(tie_word_embeddings=tied).train()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    if head_apart:
        fully_shard(model.lm_head, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    rows, row = batch(), torch.distributed.get_rank()
    loss = model(**{name: x[row : row + 1] for name, x in rows.items()}, num_items_in_batch=9, skip_logits=skip_logits)
    loss.loss.backward()
    token_tiles.TILE_NUMBERS = default
    return loss.loss.item(), {
        name: p.grad.full_tensor().float().numpy() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    ("tied", "head_apart", "mixed"),
    [(False, True, False), (False, False, False), (True, False, False), (False, True, True)],
)
def test_the_chunked_loss_with_a_head_sharded_by_fsdp2(tied: bool, head_apart: bool, mixed: bool) -> None:
    plain = run_distributed(fsdp_run, 2, tied, head_apart, mixed, False)
    chunked = run_distributed(fsdp_run, 2, tied, head_apart, mixed, True)
    tolerance = 3e-2 if mixed else 1e-5
    for (loss, d), (expected_loss, expected) in zip(chunked, plain, strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert d.keys() == expected.keys() and d
        for name, x in expected.items():
            assert ((d[name] - x) ** 2).sum() <= tolerance**2 * max((x**2).sum(), 1e-6), name
