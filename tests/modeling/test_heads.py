"""Classification, question answering and masked-LM heads, and the bidirectional models below them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from linear_llama3 import (
    LinearLlama3ForCausalLM,
    LinearLlama3ForMaskedLM,
    LinearLlama3ForQuestionAnswering,
    LinearLlama3ForSequenceClassification,
    LinearLlama3ForTokenClassification,
)
from linear_llama3.sequence_parallel import SequenceParallelContext, enable_sequence_parallel
from tests.helpers.marks import each_attention_implementation, slow_unless
from tests.helpers.tiny import BIDIRECTIONAL_MIXERS, VOCAB, bidirectional_config, tiny_config, tiny_masked_lm, tokens

HEADS = {
    "classes": (AutoModelForSequenceClassification, LinearLlama3ForSequenceClassification),
    "tokens": (AutoModelForTokenClassification, LinearLlama3ForTokenClassification),
    "answers": (AutoModelForQuestionAnswering, LinearLlama3ForQuestionAnswering),
    "masks": (AutoModelForMaskedLM, LinearLlama3ForMaskedLM),
}


@pytest.mark.parametrize("kind", HEADS)
def test_auto_classes(kind: str, tmp_path: Path) -> None:
    auto, ours = HEADS[kind]
    config = bidirectional_config() if kind == "masks" else tiny_config("gla", num_labels=3)
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    assert type(model) is ours
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path).eval()
    x = tokens(2, 9)
    for a, b in zip(model(x).to_tuple(), again(x).to_tuple(), strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)


class Rows(torch.utils.data.Dataset):
    """Four rows with labels for every head."""

    def __init__(self, kind: str) -> None:
        x = tokens(4, 9)
        targets: dict[str, dict[str, Tensor]] = {
            "classes": {"labels": x[:, 4] % 3},
            "tokens": {"labels": x % 3},
            "answers": {"start_positions": x[:, 0] % 9, "end_positions": x[:, 1] % 9},
            "masks": {"labels": x.masked_fill(x % 3 > 0, -100)},
        }
        self.columns = {"input_ids": x, **targets[kind]}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[row] for name, column in self.columns.items()}


@slow_unless(lambda kind: kind in ("classes", "masks"), kind=HEADS)
def test_accumulated_batches_equal_one_batch(kind: str, tmp_path: Path) -> None:
    """With transformers' generic heads, Trainer would sum the means of the batches."""
    found = []
    for batch in (4, 2, 1):
        torch.manual_seed(0)
        config = bidirectional_config() if kind == "masks" else tiny_config("gla", num_labels=3, classifier_dropout=0.0)
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch, max_steps=1,
            learning_rate=0.1, optim="sgd", max_grad_norm=1e9, logging_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(HEADS[kind][1](config), args, train_dataset=Rows(kind))
        trainer.train()
        found.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def test_a_tied_masked_lm_and_tuples(tmp_path: Path) -> None:
    model = tiny_masked_lm(tie_word_embeddings=True, return_dict=False)
    out = model(tokens(2, 9), labels=tokens(2, 9))
    assert isinstance(out, tuple) and torch.equal(out[1], model(tokens(2, 9), return_dict=True).logits)
    model.save_pretrained(tmp_path)
    again = LinearLlama3ForMaskedLM.from_pretrained(tmp_path)
    for each in (model, again):
        assert each.lm_head.weight is each.model.embed_tokens.weight
    again.resize_token_embeddings(70)
    assert again.lm_head.weight is again.model.embed_tokens.weight and again.lm_head.weight.shape == (70, 32)


@pytest.mark.parametrize("kind", ["classes", "tokens", "answers"])
def test_heads_learn(kind: str) -> None:
    torch.manual_seed(0)
    model = HEADS[kind][1](tiny_config("basic", num_labels=3, classifier_dropout=0.0)).train()
    batch = Rows(kind).columns
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = model(**batch).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@torch.no_grad()
def test_sequence_classes_are_those_of_the_last_token() -> None:
    torch.manual_seed(0)
    model = LinearLlama3ForSequenceClassification(tiny_config("gla", num_labels=3)).eval()
    x = tokens(2, 9)
    padded = torch.cat([x, x.new_zeros(2, 3)], 1)  # 0 is the padding token
    mask = (padded != 0).long()
    expected = model.score(model.model(x).last_hidden_state[:, -1])
    torch.testing.assert_close(model(x).logits, expected)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, expected)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="no padding token"):
        model(x)


@pytest.mark.parametrize("interval", [2, 0, 1])
@pytest.mark.parametrize("mixer", BIDIRECTIONAL_MIXERS)
def test_bidirectional_models_see_both_sides(mixer: str, interval: int) -> None:
    """Attention alone has no order: if all positions are 0, permuting the tokens permutes the output.
    A causal model fails this, as does one that leaves out a part of the sequence."""
    model = tiny_masked_lm(mixer, full_attention_interval=interval).double()
    x = tokens(2, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    positions = torch.zeros(2, 9, dtype=torch.long)
    embeds = model.get_input_embeddings()(x).detach().requires_grad_()

    def logits(inputs: Tensor) -> Tensor:
        edges = torch.tensor([0, 9, 18], dtype=torch.int32)  # positions alone would tell nine documents
        return model(inputs_embeds=inputs, position_ids=positions, cu_seq_lens_q=edges).logits

    out = logits(embeds)
    torch.testing.assert_close(out[:, order], logits(embeds[:, order]), rtol=1e-4, atol=1e-4)
    (reach,) = torch.autograd.grad(out[0, 4].sum(), embeds)
    assert (reach[0].abs().sum(-1) > 1e-6).all() and (reach[1] == 0).all()


@pytest.mark.parametrize("interval", [2, 0, 1])
@pytest.mark.parametrize("mixer", BIDIRECTIONAL_MIXERS)
@torch.no_grad()
def test_bidirectional_padding_and_packing(mixer: str, interval: int) -> None:
    model = tiny_masked_lm(mixer, full_attention_interval=interval)
    a, b = tokens(1, 9), tokens(1, 5, seed=2)
    expected = model(a).logits, model(b).logits
    for side in ("right", "left"):
        filler = torch.zeros(1, 4, dtype=torch.long)
        row = torch.cat([b, filler] if side == "right" else [filler, b], 1)
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, slice(5, None) if side == "right" else slice(0, 4)] = 0
        out = model(torch.cat([a, row]), attention_mask=mask).logits
        assert out.isfinite().all()
        torch.testing.assert_close(out[:1], expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out[1:, mask[1].bool()], expected[1], rtol=1e-4, atol=1e-4)
    positions = torch.cat([torch.arange(9), torch.arange(5)])[None]
    packed = model(torch.cat([a, b], 1), position_ids=positions).logits
    torch.testing.assert_close(packed[:, :9], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[:, 9:], expected[1], rtol=1e-4, atol=1e-4)


@each_attention_implementation
@torch.no_grad()
def test_attention_backends_agree(implementation: str, stance: str) -> None:
    model = tiny_masked_lm()
    x, mask = tokens(2, 9), torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    expected = model(x, attention_mask=mask).logits
    model.set_attn_implementation(implementation)
    with torch.compiler.set_stance(stance):
        got = model(x, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", ["based", "rebased"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_normalized_mixer_has_finite_gradients(mixer: str, side: str) -> None:
    """A token before the first one sees nothing: 0 / 0."""
    torch.manual_seed(0)
    model = LinearLlama3ForCausalLM(tiny_config(mixer, full_attention_interval=0))
    x = tokens(1, 6)
    alone = model(x, labels=x).loss
    filler, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)
    mask[:, slice(0, 3) if side == "left" else slice(6, None)] = 0
    padded = torch.cat([filler, x] if side == "left" else [x, filler], 1)
    labels = torch.cat([filler - 100, x] if side == "left" else [x, filler - 100], 1)
    labels[:, x.shape[1] if side == "right" else 3] = -100  # no position predicts the first token
    loss = model(padded, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, alone)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected, got = torch.autograd.grad(alone, parameters), torch.autograd.grad(loss, parameters)
    for name, a, b in zip(names, expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("mixer", ["lightning", "retention", "gla"])
def test_a_decay_has_a_direction(mixer: str) -> None:
    with pytest.raises(ValueError, match=f"needs a mixer without a decay.* got '{mixer}'.*basic"):
        bidirectional_config(mixer)
    bidirectional_config(mixer, full_attention_interval=1)  # no linear layer


def test_contradicting_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="predicts the next token"):
        LinearLlama3ForCausalLM(bidirectional_config())
    with pytest.raises(ValueError, match="reads both sides of a token"):
        LinearLlama3ForMaskedLM(tiny_config("basic"))
    model = tiny_masked_lm()
    with pytest.raises(ValueError, match="reads the complete sequence at once"):
        model(tokens(1, 5), use_cache=True)
    with pytest.raises(ValueError, match="got is_causal=True; leave"):
        model(tokens(1, 5), is_causal=True)
    assert model.model(tokens(1, 5)).past_key_values is None


@pytest.mark.parametrize("kind", ["classes", "tokens", "answers"])
def test_heads_that_need_complete_sequences_are_refused_under_a_context(kind: str) -> None:
    model = HEADS[kind][1](tiny_config("basic"))
    with pytest.raises(ValueError, match=f"got a {HEADS[kind][1].__name__}, whose head reads"):
        enable_sequence_parallel(model, SequenceParallelContext(None))
    enable_sequence_parallel(model, None)


def test_masked_labels_are_not_shifted() -> None:
    model = tiny_masked_lm()
    x = tokens(2, 9)
    labels = torch.full_like(x, -100)
    labels[:, 3] = x[:, 3]
    out = model(x, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, 3], x[:, 3])
    torch.testing.assert_close(out.loss, expected)
    assert out.logits.shape == (2, 9, VOCAB)
