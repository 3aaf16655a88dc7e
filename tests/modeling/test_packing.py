"""A packed row equals its documents run alone, for every description of documents and both kinds of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from tests.helpers.marks import slow_unless
from tests.helpers.tiny import MIXER_NAMES, gradients, tiny_model, tokens

LENGTHS = [[5, 1, 17, 9], [12, 20]]  # of the documents in each row


def packed_kwargs(description: str, rows: list[list[int]]) -> dict[str, Any]:
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    lengths = torch.tensor([n for row in rows for n in row])
    edges = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    keywords: dict[str, dict[str, Any]] = {
        "position_ids": {"position_ids": positions},
        "cu_seq_lens": {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges},
        "empty documents": {"cu_seq_lens_q": edges.repeat_interleave(2), "cu_seq_lens_k": edges.repeat_interleave(2)},
        "both": {"position_ids": positions, "cu_seq_lens_q": edges},
        "cu_seq_lens_k": {"cu_seq_lens_k": edges},
        "seq_idx": {"seq_idx": numbers(rows)},
        "all of them": {
            "position_ids": positions, "seq_idx": numbers(rows), "cu_seq_lens_q": edges, "cu_seq_lens_k": edges.long(),
            "max_length_q": int(lengths.max()), "max_length_k": int(lengths.max()),
        },
        "all-ones mask": {"position_ids": positions, "attention_mask": torch.ones_like(positions)},
        "edges and running positions": {
            "position_ids": torch.arange(positions.shape[1])[None].expand_as(positions), "cu_seq_lens_q": edges,
        },
    }  # fmt: skip
    return keywords[description]


def numbers(rows: list[list[int]]) -> Tensor:
    """`seq_idx` as Mamba and Granite define it: int32 document numbers, from 0 in each row."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]).int()


DESCRIPTIONS = [
    "position_ids", "cu_seq_lens", "empty documents", "both", "cu_seq_lens_k", "seq_idx", "all of them",
    "all-ones mask", "edges and running positions",
]  # fmt: skip
PACKED_MODELS = {**{mixer: (mixer, 2) for mixer in MIXER_NAMES}, "linear": ("gla", 0), "softmax": ("gla", 1)}


@slow_unless(
    lambda model, description, batch: batch == 2 and (model == "gla" or description in ("position_ids", "seq_idx")),
    model=PACKED_MODELS,
    description=DESCRIPTIONS,
    batch=[1, 2],
)
def test_packed_documents_equal_documents_alone(model: str, description: str, batch: int) -> None:
    (mixer, interval), rows = PACKED_MODELS[model], LENGTHS[:batch]
    packed_model = tiny_model(mixer, full_attention_interval=interval).double()  # float32 costs Rebased digits
    x = tokens(len(rows), sum(rows[0]))
    with torch.no_grad():
        logits = packed_model(x, **packed_kwargs(description, rows)).logits
        for row, documents in enumerate(rows):
            start = 0
            for length in documents:
                alone = packed_model(x[row : row + 1, start : start + length]).logits[0]
                packed = logits[row, start : start + length]
                torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
                start += length
        unpacked = packed_model(x).logits
    assert (logits - unpacked).abs().max() > 0.1  # document edges make a difference


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_of_packed_documents_equal_documents_alone(implementation: str) -> None:
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
        ({"attention_mask": torch.tensor([[1] * 31 + [0]])}, "packed rows must not contain padding, got .* 1 zeros"),
        (
            {"position_ids": None, "cu_seq_lens_q": torch.tensor([0, 5, 30])},
            r"from 0 to batch \* length = 32",
        ),
        (
            {"position_ids": None, "cu_seq_lens_q": torch.tensor([2, 5, 32])},
            r"from 0 to batch \* length = 32",
        ),
        ({"position_ids": None, "cu_seq_lens_q": torch.tensor([0, 9, 5, 32])}, "must increase"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 5, 32])},
            r"cu_seq_lens_q and position_ids .* edges \[0, 5, 32\], but positions that restart at token 23 of row 0",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 5, 6, 20, 23, 32])},
            "cu_seq_lens_q and position_ids .* but positions that continue at token 20 of row 0",
        ),
        ({"seq_idx": torch.zeros(1, 32, dtype=torch.int32)}, r"seq_idx and position_ids .* edges \[0, 32\]"),
        (
            {"cu_seq_lens_k": torch.tensor([0, 5, 32]), "cu_seq_lens_q": torch.tensor([0, 6, 32])},
            r"cu_seq_lens_q and cu_seq_lens_k must .* \[0, 6, 32\] and \[0, 5, 32\]; give one of them",
        ),
        ({"position_ids": None, "seq_idx": numbers(LENGTHS[:1]), "use_cache": True}, "takes no cache, got 4 documents"),
        ({"position_ids": None, "seq_idx": numbers(LENGTHS[:1])[0]}, r"seq_idx must hold .* got torch.int32 of .*32,"),
        ({"position_ids": None, "seq_idx": torch.rand(1, 32)}, "seq_idx must hold .* got torch.float32"),
        ({"segment_ids": torch.ones(1, 32)}, r"not read the keyword 'segment_ids', got one of shape \(1, 32\)"),
        ({"cu_seqlens": torch.tensor([0, 5, 32])}, r"read the keyword 'cu_seqlens', .*describe .* by cu_seq_lens_q"),
    ],
)
def test_contradicting_descriptions_are_refused(kwargs: dict[str, Any], message: str) -> None:
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


def test_generation_does_not_drop_seq_idx() -> None:
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="a packed batch takes no cache, got 2 documents"):
        tiny_model("gla").generate(tokens(1, 8), seq_idx=seq_idx, max_new_tokens=2)


def test_positions_that_jump_ahead_are_no_documents_beside_edges() -> None:
    """Two documents, each with a gap in its positions, as in position-skipping training."""
    model, x = tiny_model("retention"), tokens(1, 8)
    positions = torch.tensor([[0, 1, 9, 10, 0, 7, 8, 9]])
    packed = model(x, position_ids=positions, cu_seq_lens_q=torch.tensor([0, 4, 8])).logits
    for part in (slice(0, 4), slice(4, 8)):
        alone = model(x[:, part], position_ids=positions[:, part], cu_seq_lens_q=torch.tensor([0, 4])).logits
        torch.testing.assert_close(packed[:, part], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"return_position_ids": False, "return_seq_idx": True}, {"return_seq_idx": True}])
def test_what_transformers_collator_makes(options: dict[str, bool]) -> None:
    model, x = tiny_model("gla"), tokens(2, 9)
    documents = [x[0, :5].tolist(), x[1].tolist()]
    try:
        collator = DataCollatorWithFlattening(**options)
        batch = collator([{"input_ids": ids} for ids in documents])
    except TypeError:
        pytest.skip("this release of transformers always returns position_ids")
    if not options.get("return_position_ids", True):
        batch.pop("position_ids", None)  # earlier releases take any option
    assert "seq_idx" in batch
    logits = model(**batch).logits
    torch.testing.assert_close(logits[:, :5], model(x[:1, :5]).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:, 5:], model(x[1:]).logits, rtol=1e-4, atol=1e-4)


def test_token_types_of_a_tokenizer_change_nothing() -> None:
    """A generic tokenizer returns token types, which Llama does not have."""
    model, x = tiny_model("gla"), tokens(2, 9)
    assert torch.equal(model(x, token_type_ids=torch.zeros_like(x)).logits, model(x).logits)
