"""The model under a sequence-parallel context: the arguments that reach the layers, and errors for wrong inputs.

A group of one rank replaces the real context, so the results must equal the model's own. Communication is tested in
tests/sequence_parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.ops import linear_attention
from tests.helpers.tiny import MIXER_NAMES, VOCAB, gradients, tiny_model, tokens


class OneRank:
    """A context of one rank, with its own softmax attention."""

    rank = 0
    layout = "contiguous"

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        return torch.arange(tokens, device=device)

    def __init__(self) -> None:
        self.exchange_caches: list[MutableMapping[str, Any] | None] = []

    def start_linear_attention(
        self, k: Tensor, v: Tensor, *, exchange_cache: MutableMapping[str, Any] | None = None, **kwargs: Any
    ) -> Callable[[Tensor], Tensor]:
        self.exchange_caches.append(exchange_cache)
        return lambda q: linear_attention(q, k, v, **kwargs)[0]

    def softmax_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        cu_seqlens: Tensor | None,
        causal: bool,
        exchange_cache: MutableMapping[str, Any] | None,
    ) -> Tensor:
        assert causal
        self.exchange_caches.append(exchange_cache)
        length = q.shape[1]
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        if cu_seqlens is not None:
            document = torch.bucketize(torch.arange(length), cu_seqlens[1:], right=True)
            allowed &= document[:, None] == document
        return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.fixture
def context() -> Iterator[OneRank]:
    yield OneRank()


def enable(model: LinearLlama3ForCausalLM, context: OneRank) -> None:
    modules = [module for module in model.modules() if hasattr(module, "sequence_parallel_context")]
    assert len(modules) == 1 + model.config.num_hidden_layers  # the base model and every attention
    for module in modules:
        module.sequence_parallel_context = context


def batch(documents: list[int] | None = None) -> dict[str, Tensor]:
    x = tokens(1, 24)
    local = {"input_ids": x, "labels": x, "shift_labels": F.pad(x, (0, 1), value=-100)[:, 1:]}
    if documents is None:
        return {**local, "position_ids": torch.arange(24)[None]}
    edges = F.pad(torch.tensor(documents).cumsum(0), (1, 0)).int()
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    return {**local, "position_ids": positions, "cu_seq_lens_q": edges, "cu_seq_lens_k": edges}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("documents", [None, [5, 8, 11]])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_one_rank_equals_the_plain_model(
    context: OneRank, mixer: str, documents: list[int] | None, checkpointing: bool
) -> None:
    model = tiny_model(mixer).train()
    plain = model(**batch(documents), num_items_in_batch=23)
    plain.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    enable(model, context)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    out = model(**batch(documents), num_items_in_batch=23)
    out.loss.backward()
    torch.testing.assert_close(out.logits, plain.logits, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients(model).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3 * scale, msg=name)

    seen = context.exchange_caches
    if checkpointing:  # one mapping per layer, found again by the recomputation in backward order
        assert [id(cache) for cache in seen[:4]] == [id(cache) for cache in seen[:3:-1]]
        assert len({id(cache) for cache in seen}) == 4 and all(isinstance(cache, MutableMapping) for cache in seen)
    else:
        assert seen == [None] * 4


def test_a_shard_without_labels_has_loss_zero(context: OneRank) -> None:
    model = tiny_model().train()
    enable(model, context)
    local = batch()
    local["shift_labels"] = torch.full_like(local["labels"], -100)
    loss = model(**local, num_items_in_batch=50).loss
    loss.backward()
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(model).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": None}, "own position_ids, got none; call context.shard_batch"),
        ({"position_ids": torch.arange(24)[None] % 12}, "described by cu_seq_lens_q of the complete sequence"),
        (
            {"seq_idx": torch.zeros(1, 24).int()},
            "of the complete sequence, got seq_idx; call context.shard_batch",
        ),
        ({"attention_mask": torch.ones(1, 24)}, "no attention_mask, got one; call context.shard_batch"),
        ({"use_cache": True}, r"no cache, .* enable_sequence_parallel\(model, None\)"),
        ({"shift_labels": None}, "labels without shift_labels; call context.shard_batch"),
        ({"num_items_in_batch": None}, "needs num_items_in_batch, got none; pass the number of labels"),
        ({"output_attentions": True}, "got output_attentions=True"),
    ],
)
def test_inputs_that_are_not_a_shard_are_refused(context: OneRank, change: dict[str, Any], message: str) -> None:
    model = tiny_model(attn_implementation="eager")
    enable(model, context)
    model(**batch(), num_items_in_batch=23)
    with pytest.raises(ValueError, match=message):
        model(**{**batch(), "num_items_in_batch": 23, **change})


def test_cache_generation_and_dropout_are_refused(context: OneRank) -> None:
    model = tiny_model(attention_dropout=0.1)
    cache = model(tokens(1, 4)).past_key_values
    enable(model, context)
    with pytest.raises(ValueError, match="there is no cache"):
        model(**batch(), past_key_values=cache, num_items_in_batch=23)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=r"cannot generate.* enable_sequence_parallel\(model, None\)"):
            model.generate(tokens(1, 4), use_cache=use_cache, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"attention_dropout must be 0 .* got 0.1"):
        model.train()(**batch(), num_items_in_batch=23)


def test_rope_that_depends_on_the_length_is_refused(context: OneRank) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model(rope_parameters=rope)
    enable(model, context)
    with pytest.raises(ValueError, match="rope_type 'dynamic' depends on the length"):
        model(**batch(), num_items_in_batch=23)


def test_there_is_no_cache_by_default(context: OneRank) -> None:
    model = tiny_model()
    enable(model, context)
    out = model(**batch(), num_items_in_batch=23)
    assert out.past_key_values is None
    assert out.logits.shape == (1, 24, VOCAB)
