"""Losses by context against a direct computation, needles against models that copy and that guess, all sharded too."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.commands import evaluation, needle
from linear_llama3.commands.evaluation import measure_loss, plot_loss_by_context, score_tokens
from linear_llama3.commands.needle import needle_accuracy, plot_needle, text_haystack, token_haystack
from linear_llama3.sequence_parallel import SequenceParallelConfig, SequenceParallelContext, enable_sequence_parallel
from tests.helpers.ranks import run_distributed
from tests.helpers.recipes import write_tokenizer
from tests.helpers.tiny import VOCAB, tiny_config, tiny_model, tokens

DOCUMENTS = [9, 4, 6, 1, 18]  # two rows of 19


def batches() -> list[dict[str, Tensor]]:
    """A packed batch of two rows, with labels at a few tokens only, and an unpacked one with padding."""
    ids = tokens(2, 19)
    labels = ids.clone()
    labels[:, 3:6] = -100
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS]).view(2, 19)
    labels[positions == 0] = -100
    mask = torch.ones(2, 11)
    mask[1, 7:] = 0
    return [
        {"input_ids": ids, "labels": labels, "position_ids": positions},
        {"input_ids": tokens(2, 11, seed=5), "attention_mask": mask},
    ]


def direct(model: nn.Module) -> list[dict[int, float]]:
    """Return tokens of context -> losses, computed on each document alone, token by token."""
    first, second = batches()
    documents = [
        (ids, labels)
        for ids, labels in zip(
            first["input_ids"].flatten().split(DOCUMENTS), first["labels"].flatten().split(DOCUMENTS), strict=True
        )
    ]
    documents += [(ids[:n], ids[:n]) for ids, n in zip(second["input_ids"], (11, 7), strict=True)]
    found = []
    for ids, labels in documents:
        losses = -model(ids[None]).logits[0].double().log_softmax(-1)
        found.append({c: losses[c - 1, labels[c]].item() for c in range(1, len(ids)) if labels[c] >= 0})
    return found


def mean_of(documents: list[dict[int, float]]) -> dict[str, Any]:
    """Return the mean of all losses, and the standard error of a ratio of sums over documents."""
    documents = [losses for losses in documents if losses]
    tokens = sum(map(len, documents))
    mean = sum(sum(losses.values()) for losses in documents) / tokens
    residuals = [sum(loss - mean for loss in losses.values()) for losses in documents]
    error = statistics.stdev(residuals) * math.sqrt(len(documents)) / tokens if len(documents) > 1 else None
    return {"loss": mean, "standard_error": error, "tokens": tokens, "documents": len(documents)}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes)).eval()


def agree(got: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Compare to 1e-9; None, the standard error of a single document, equals only None."""
    return got.keys() == expected.keys() and all(
        got[key] is None if value is None else got[key] == pytest.approx(value, rel=1e-9)
        for key, value in expected.items()
    )


@pytest.mark.parametrize("kind", ["gla", "rebased", "llama"])
def test_losses_are_those_of_documents_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "PIECE", 5)
    model = (llama() if kind == "llama" else tiny_model(kind)).double()
    documents = direct(model)
    model.train()
    result = measure_loss(model, batches())
    assert model.training and all(p.grad is None for p in model.parameters())
    mean = mean_of(documents)
    assert agree({key: result[key] for key in mean}, mean)
    assert result["perplexity"] == pytest.approx(math.exp(mean["loss"]), rel=1e-9)
    assert result["perplexity_standard_error"] == pytest.approx(math.exp(mean["loss"]) * mean["standard_error"])
    assert [bucket["first"] for bucket in result["by_context"]] == [1, 2, 4, 8, 16]
    for bucket in result["by_context"]:
        first, last = bucket.pop("first"), bucket.pop("last")
        inside = [{c: loss for c, loss in losses.items() if first <= c <= last} for losses in documents]
        assert last == 2 * first - 1 and agree(bucket, mean_of(inside))


def test_the_standard_error_is_the_spread_of_means_over_draws_of_documents() -> None:
    """In 5,000 draws of 300 documents with dependent tokens, the standard error of one draw is the spread of all.

    A standard error that treats tokens as independent would be a fifth of that.
    """
    source = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        tokens = torch.randint(1, 40, (300,), generator=source).double()
        own = torch.randn(300, generator=source, dtype=torch.float64)  # the same for all tokens of a document
        return torch.stack([tokens, tokens * (2 + own)], dim=1)

    draws = [evaluation._mean(draw()) for _ in range(5000)]
    spread = statistics.stdev(found["loss"] for found in draws)
    assert statistics.mean(found["standard_error"] for found in draws) == pytest.approx(spread, rel=0.05)


def test_one_document_has_no_standard_error() -> None:
    result = measure_loss(tiny_model("gla"), [{"input_ids": tokens(1, 9)}])
    assert result["documents"] == 1 and result["standard_error"] is result["perplexity_standard_error"] is None
    assert "±" not in evaluation.plus_minus(result["loss"], result["standard_error"], 4)


def sharded_results(layout: str) -> tuple[dict[str, Any], list[dict[str, float]]]:
    model = tiny_model("gla").double()
    context = SequenceParallelContext(dist.group.WORLD, SequenceParallelConfig(layout=layout))
    enable_sequence_parallel(model, context)
    cells = needle_accuracy(model, token_haystack(VOCAB, answer=3), lengths=[10, 21], depths=[0.0, 1.0], samples=2)
    return measure_loss(model, batches()), cells


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_equals_one_process(ranks: int, layout: str) -> None:
    model = tiny_model("gla").double()
    unsharded = measure_loss(model, batches())
    cells = needle_accuracy(model, token_haystack(VOCAB, answer=3), lengths=[10, 21], depths=[0.0, 1.0], samples=2)
    for ours, needles in run_distributed(sharded_results, ranks, layout):
        for got, expected in zip([*ours.pop("by_context"), *needles], [*unsharded["by_context"], *cells], strict=True):
            assert agree(got, expected)
        assert agree(ours, {key: value for key, value in unsharded.items() if key != "by_context"})


def different_rows() -> None:
    model = tiny_model("gla")
    enable_sequence_parallel(model, SequenceParallelContext(dist.group.WORLD))
    with pytest.raises(ValueError, match="all ranks of a sequence must load the same batch"):
        measure_loss(model, [{"input_ids": tokens(1, 9, seed=dist.get_rank())}])


def test_refusals() -> None:
    run_distributed(different_rows, 2)
    with pytest.raises(ValueError, match=r"got a Linear; merge adapters"):
        score_tokens(nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match="needs a row with a label, got none"):
        measure_loss(tiny_model("gla"), [{"input_ids": tokens(1, 1)}])
    with pytest.raises(ValueError, match=r"9 tokens must hold the needle and the question, got 10 for them"):
        token_haystack(VOCAB, answer=3)(9, 0.5, random.Random(0))
    with pytest.raises(ValueError, match="got vocab_size=2 and answer=1"):
        token_haystack(2)


class Copies(LinearLlama3ForCausalLM):
    """Answers by hand: what stood behind the last tokens when they stood together before, else token 0."""

    def __init__(self, match: int, vocab_size: int) -> None:
        super().__init__(tiny_config("basic"))
        self.model, self.lm_head = _Induction(match, vocab_size), nn.Identity()  # type: ignore[assignment]


class _Induction(nn.Module):
    sequence_parallel_context = None

    def __init__(self, match: int, vocab_size: int) -> None:
        super().__init__()
        self.match, self.vocab_size = match, vocab_size
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        ids, guesses = input_ids[0].tolist(), []
        for t in range(len(ids)):
            tail = ids[max(0, t + 1 - self.match) : t + 1]
            starts = [s for s in range(t + 1 - len(tail)) if ids[s : s + len(tail)] == tail]
            guesses.append(ids[starts[-1] + len(tail)] if starts else 0)
        one_hot = nn.functional.one_hot(torch.tensor([guesses]), self.vocab_size)
        return SimpleNamespace(last_hidden_state=50.0 * one_hot)


def test_a_model_that_copies_finds_every_needle() -> None:
    cells = needle_accuracy(Copies(2, 5000), token_haystack(5000, answer=3), lengths=[16, 60], samples=3)
    assert [(cell["length"], cell["depth"]) for cell in cells] == [(n, d) for n in (16, 60) for d in needle.DEPTHS]
    assert all(cell["accuracy"] == 1.0 and cell["loss"] < 1e-6 for cell in cells)


def test_a_model_that_copies_half_of_an_answer_finds_none() -> None:
    """Token 0 for the last token: a needle counts if all of its tokens are right."""

    class Forgets(_Induction):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
            out = super().forward(input_ids)
            out.last_hidden_state[:, -2] = -50.0 * nn.functional.one_hot(input_ids[:, -1], self.vocab_size)
            return out

    model = Copies(2, 100)
    model.model = Forgets(2, 100)  # type: ignore[assignment]
    (cell,) = needle_accuracy(model, token_haystack(100, answer=3), lengths=[40], depths=[0.5], samples=4)
    assert cell["accuracy"] == 0.0 and cell["loss"] == pytest.approx((50 + math.log(99)) / 3, rel=1e-3)


def test_a_model_that_guesses() -> None:
    """One in 8 possible answers is right; 4 standard deviations of 300 samples are 0.076."""
    model = tiny_model("basic", vocab_size=9, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model.lm_head.weight.data[8] = 0  # never the marker
    model.lm_head.weight.data.mul_(0.1)
    (cell,) = needle_accuracy(model, token_haystack(9), lengths=[24], depths=[0.5], samples=300)
    found = [sample < round(300 * cell["accuracy"]) for sample in range(300)]
    assert cell["samples"] == 300
    assert cell["standard_error"] == pytest.approx(statistics.pstdev(found) / math.sqrt(300))
    assert abs(cell["accuracy"] - 1 / 8) < 0.076
    assert cell["loss"] == pytest.approx(math.log(9), rel=0.1)


def test_a_haystack_of_tokens() -> None:
    for depth, at in ((0.0, 0), (0.5, 5), (1.0, 10)):
        hay = token_haystack(50, answer=2)(18, depth, random.Random(3))
        marker, key, *answer = hay.tokens[-4:]
        assert len(hay.tokens) == 18 and hay.answer == 2 and marker == 49
        assert [i for i, token in enumerate(hay.tokens) if token == 49] == [at, 14]
        assert hay.tokens[at : at + 4] == [49, key, *answer]


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_haystack_of_text(depth: float, tmp_path: Path) -> None:
    """One token per letter; the tokenizer knows small letters only, digits are all the same to it."""
    tokenizer = write_tokenizer(tmp_path)
    tokenizer.add_tokens([*" ABCDEHIJKLMNOQRT0123456789"])
    hay = text_haystack(tokenizer)(700, depth, random.Random(1))
    text = "".join(tokenizer.convert_ids_to_tokens(hay.tokens))
    number = text[-7:]
    assert hay.answer == 8 and text[-8] == " " and number.isdigit()
    sentence = text[text.rindex("The secret number") :] + "."
    assert sentence.count("The") == 1 and text.count(sentence) == 1
    sentences = [part for part in text.split(".") if part]
    assert 600 < len(text) <= 700 and not text.startswith(".")
    assert sentences.index(" " + sentence[:-1]) == round(depth * (len(sentences) - 2))


def test_plots(tmp_path: Path) -> None:
    buckets = [{"first": 2**n, "last": 2 ** (n + 1) - 1, "tokens": 5, "loss": 3.0 - 0.1 * n} for n in range(6)]
    plot_loss_by_context(buckets, tmp_path / "loss.png")
    cells = [{"length": n, "depth": d, "accuracy": d, "loss": 0.0} for n in (64, 128) for d in (0.0, 0.5, 1.0)]
    plot_needle(cells, tmp_path / "needle.png")
    for name in ("loss.png", "needle.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
