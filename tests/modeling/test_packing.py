"""A packed row equals its documents run alone, told either way, in both kinds of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.modeling.tiny import MIXER_NAMES, gradients, tiny_model, tokens

LENGTHS = [[5, 1, 17, 9], [12, 20]]  # of the documents in each row


def packed_kwargs(told_by: str, rows: list[list[int]]) -> dict[str, Tensor]:
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    lengths = torch.tensor([n for row in rows for n in row])
    edges = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    return {
        "position_ids": {"position_ids": positions},
        "cu_seq_lens": {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges},
        "empty documents": {"cu_seq_lens_q": edges.repeat_interleave(2), "cu_seq_lens_k": edges.repeat_interleave(2)},
        "both": {"position_ids": positions, "cu_seq_lens_q": edges},
        "all-ones mask": {"position_ids": positions, "attention_mask": torch.ones_like(positions)},
        "edges and running positions": {
            "position_ids": torch.arange(positions.shape[1])[None].expand_as(positions), "cu_seq_lens_q": edges,
        },
    }[told_by]  # fmt: skip


@pytest.mark.parametrize("rows", [LENGTHS[:1], LENGTHS], ids=["B1", "B2"])
@pytest.mark.parametrize(
    "told_by",
    ["position_ids", "cu_seq_lens", "empty documents", "both", "all-ones mask", "edges and running positions"],
)
@pytest.mark.parametrize(("mixer", "interval"), [(mixer, 2) for mixer in MIXER_NAMES] + [("gla", 0), ("gla", 1)])
def test_packed_equals_alone(mixer: str, interval: int, told_by: str, rows: list[list[int]]) -> None:
    model = tiny_model(mixer, full_attention_interval=interval).double()  # float32 costs Rebased digits (mixers.py)
    x = tokens(len(rows), sum(rows[0]))
    with torch.no_grad():
        logits = model(x, **packed_kwargs(told_by, rows)).logits
        for row, documents in enumerate(rows):
            start = 0
            for length in documents:
                alone = model(x[row : row + 1, start : start + length]).logits[0]
                packed = logits[row, start : start + length]
                torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
                start += length
        unpacked = model(x).logits
    assert (logits - unpacked).abs().max() > 0.1  # the documents do matter


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients(implementation: str) -> None:
    model = tiny_model("gla", attn_implementation=implementation)
    x = tokens(2, 32)
    labels = x.clone()
    for row, documents in enumerate(LENGTHS):
        for end in torch.tensor(documents).cumsum(0)[:-1].tolist():
            labels[row, end] = -100  # no document predicts the next one's first token
    count = (labels[:, 1:] != -100).sum()
    model(x, labels=labels, num_items_in_batch=count, **packed_kwargs("cu_seq_lens", LENGTHS)).loss.backward()
    packed = gradients(model)
    model.zero_grad()
    for row, documents in enumerate(LENGTHS):
        start = 0
        for length in documents:
            part = x[row : row + 1, start : start + length]
            model(part, labels=part, num_items_in_batch=count).loss.backward()
            start += length
    for name, alone in gradients(model).items():
        torch.testing.assert_close(packed[name], alone, rtol=1e-3, atol=1e-5 + 1e-4 * float(alone.abs().max()))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"use_cache": True}, "a packed batch takes no cache, got 4 documents"),
        ({"attention_mask": torch.tensor([[1] * 31 + [0]])}, "packed rows take no padding, got .* 1 zeros"),
        (
            {"position_ids": None, "cu_seq_lens_q": torch.tensor([0, 5, 30])},
            r"from 0 to batch \* length = 32",
        ),
        (
            {"position_ids": None, "cu_seq_lens_q": torch.tensor([2, 5, 32])},
            r"from 0 to batch \* length = 32",
        ),
        ({"position_ids": None, "cu_seq_lens_q": torch.tensor([0, 9, 5, 32])}, "must increase"),
    ],
)
def test_refused(kwargs: dict[str, Any], message: str) -> None:
    model = tiny_model("gla")
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 32), **{**packed_kwargs("position_ids", LENGTHS[:1]), **kwargs})


def test_a_document_across_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="documents do not cross rows"):
        tiny_model("gla")(tokens(2, 8), cu_seq_lens_q=torch.tensor([0, 5, 16]))


def test_packed_input_with_a_filled_cache_is_refused() -> None:
    model = tiny_model("gla")
    cache = model(tokens(1, 8)).past_key_values
    with pytest.raises(ValueError, match="a packed batch takes no cache"):
        model(tokens(1, 4), past_key_values=cache, position_ids=torch.tensor([[8, 9, 0, 1]]))


def test_the_default_cache_is_left_out_for_packed_input() -> None:
    model = tiny_model("gla")
    assert model(tokens(1, 8)).past_key_values is not None
    assert model(tokens(1, 8), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])).past_key_values is None
