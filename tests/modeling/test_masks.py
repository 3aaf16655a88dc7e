"""Padding masks of every dtype; masks with values other than 0 and 1 are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linear_llama3 import LinearLlama3ForTokenClassification, LinearLlama3Model
from linear_llama3.modeling import prefill
from linear_llama3.sequence_parallel import SequenceParallelContext, enable_sequence_parallel
from tests.helpers.tiny import MIXER_NAMES, gradients, tiny_config, tiny_model, tokens

DOCUMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0]])  # as some packages number them in their masks
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]])


def forward(mask: Tensor) -> None:
    tiny_model("gla")(tokens(1, 8), attention_mask=mask)


def training(mask: Tensor) -> None:
    tiny_model("gla").train()(tokens(1, 8), attention_mask=mask, labels=tokens(1, 8))


def bidirectional(mask: Tensor) -> None:
    LinearLlama3Model(tiny_config("basic", is_causal=False))(tokens(1, 8), attention_mask=mask)


def head(mask: Tensor) -> None:
    LinearLlama3ForTokenClassification(tiny_config("basic"))(tokens(1, 8), attention_mask=mask)


def generation(mask: Tensor) -> None:
    tiny_model("gla", full_attention_interval=0).generate(tokens(1, 8), attention_mask=mask, max_new_tokens=2)


def masks_of_a_static_cache(mask: Tensor) -> None:
    model = tiny_model("gla")
    model.create_masks_for_generate(model.config, torch.zeros(1, 8, 32), mask, None)


def one_token(mask: Tensor) -> None:
    tiny_model("gla")(tokens(1, 1), attention_mask=mask[:, 3:4])


def sharding(mask: Tensor) -> None:
    SequenceParallelContext(None).shard_batch({"input_ids": tokens(1, 8), "attention_mask": mask})


def sharded_prefill(mask: Tensor) -> None:
    model = tiny_model("gla")
    enable_sequence_parallel(model, SequenceParallelContext(None))
    prefill(model, tokens(1, 7), attention_mask=mask[:, :7])


@pytest.mark.parametrize(
    "use",
    [
        forward, training, bidirectional, head, generation, masks_of_a_static_cache, one_token, sharding,
        sharded_prefill,
    ],
)  # fmt: skip
def test_other_values_are_refused(use: Callable[[Tensor], None]) -> None:
    message = r"attention_mask must be 0 at padding and 1 elsewhere, got \[2.*\]; describe packed documents by"
    with pytest.raises(ValueError, match=message):
        use(DOCUMENTS)
    with pytest.raises(ValueError, match=message):
        use(DOCUMENTS.float())


@pytest.mark.parametrize("value", [0.5, -torch.inf, 255, -1])
def test_factors_and_additive_masks_are_refused(value: float) -> None:
    mask = torch.ones(1, 8)
    mask[0, 2] = value
    with pytest.raises(ValueError, match="attention_mask must be 0 at padding"):
        forward(mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_the_dtype_of_a_mask_changes_nothing(mixer: str, dtype: torch.dtype) -> None:
    """Outputs and gradients equal those of rows without padding (to the precision of float32 rotary tables)."""
    model, x = tiny_model(mixer).double(), tokens(2, 8)
    model(x[:1, 2:], labels=x[:1, 2:], num_items_in_batch=1).loss.backward()
    model(x[1:, :7], labels=x[1:, :7], num_items_in_batch=1).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    labels = x.masked_fill(PADDED == 0, -100)
    labels[0, 2] = -100  # padding predicts nothing
    out = model(x, attention_mask=PADDED.to(dtype), labels=labels, num_items_in_batch=1)
    out.loss.backward()
    torch.testing.assert_close(out.logits[0, 2:], model(x[:1, 2:]).logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.logits[1, :7], model(x[1:, :7]).logits[0], rtol=1e-4, atol=1e-4)
    for name, gradient in gradients(model).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name)
