"""Needle in a haystack: the share of facts that a model finds in a long text, by length and depth.

A number is hidden at some depth of a generated text, whose end asks for it. The answer is right if each of its tokens
has the highest logit after the preceding ones, as in greedy generation. lm_eval has such tasks (RULER), but runs them
on one process: here every haystack is sharded over all processes of the launch.

    linear-llama3 needle MODEL --length 4096 --length 131072 --output runs/evaluation
    torchrun --nproc_per_node 8 -m linear_llama3.cli needle MODEL --length 4096 --length 131072
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..modeling.loading import load_config, load_tokenizer
from ..ops.cross_entropy import IGNORE_INDEX
from ..trainer.command_line import user_errors
from .evaluation import check_inputs, load_on_processes, plus_minus, score_tokens, sum_over_ranks
from .launching import Processes

NAME = "needle"
LENGTHS = (1024, 2048, 4096, 8192)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

WORDS = (
    ("The old", "A quiet", "The tall", "Every young", "A patient", "The small"),
    ("farmer", "river", "teacher", "garden", "captain", "library", "horse", "baker"),
    ("remembers", "follows", "describes", "crosses", "paints", "measures"),
    ("the bridge", "a letter", "the morning", "some apples", "the valley", "two clocks"),
    ("before dinner", "in the rain", "with great care", "without a word", "near the sea", "every spring"),
)
CITIES = ("Lisbon", "Nairobi", "Kyoto", "Quito", "Tbilisi", "Oslo", "Hanoi", "Dakar", "Lima", "Riga")


@dataclass(frozen=True, slots=True, kw_only=True)
class Haystack:
    """Tokens that end in the answer."""

    tokens: list[int]
    answer: int  # number of tokens in the answer


Generator = Callable[[int, float, random.Random], Haystack]
"""(length, depth from 0 to 1, source of randomness) -> a haystack of at most `length` tokens."""


def text_haystack(tokenizer: PreTrainedTokenizerBase) -> Generator:
    """Return a generator of sentences with "The secret number of Oslo is 4071623." among them and at the end."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def generate(length: int, depth: float, source: random.Random) -> Haystack:
        asked = encode(f" The secret number of {source.choice(CITIES)} is")
        answer = encode(f" {source.randrange(10**6, 10**7)}")  # encoded alone, for the same tokens in both places
        needle = [*asked, *answer, *encode(".")]
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        room = _room(length, len(start) + len(needle) + len(asked) + len(answer))
        sentences: list[list[int]] = []
        while room >= 0:
            sentences.append(encode(f" {' '.join(source.choice(words) for words in WORDS)}."))
            room -= len(sentences[-1])
        sentences.pop()
        at = round(depth * len(sentences))
        hay = [token for sentence in [*sentences[:at], needle, *sentences[at:]] for token in sentence]
        return Haystack(tokens=[*start, *hay, *asked, *answer], answer=len(answer))

    return generate


def token_haystack(vocab_size: int, answer: int = 1) -> Generator:
    """Return a generator of random tokens with (marker, key, value ...) among them and at the end.

    It suits models that were trained on token ids. The marker is the last token of the vocabulary and occurs only
    there; a guess is right with probability 1 / (vocab_size - 1) for each token of the answer.
    """
    if vocab_size < 3 or answer < 1:
        raise ValueError(
            "a haystack of tokens needs a marker, two further tokens and an answer, got "
            f"vocab_size={vocab_size} and answer={answer}"
        )

    def generate(length: int, depth: float, source: random.Random) -> Haystack:
        needle = [vocab_size - 1, *(source.randrange(vocab_size - 1) for _ in range(1 + answer))]
        hay = [source.randrange(vocab_size - 1) for _ in range(_room(length, 2 * len(needle)))]
        at = round(depth * len(hay))
        return Haystack(tokens=[*hay[:at], *needle, *hay[at:], *needle], answer=answer)

    return generate


def _room(length: int, needed: int) -> int:
    if length < needed:
        raise ValueError(f"a haystack of {length} tokens must hold the needle and the question, got {needed} for them")
    return length - needed


def needle_accuracy(
    model: nn.Module,
    generate: Generator,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    samples: int = 8,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Return the share of needles that the model finds, for every length and depth.

    A model under a sequence-parallel context reads its shard of every haystack.

    Returns:
        `length`, `depth`, `samples`, `accuracy` with its `standard_error`, and `loss`, the mean over the tokens of the
        answers; the same on every rank. The standard error is that of a binomial proportion, sqrt(p (1 - p) / samples).
        It treats samples as independent, and is 0 if all or none are found, which means little for few samples.
    """
    source, device = random.Random(seed), next(model.parameters()).device
    cells = [(length, depth) for length in lengths for depth in depths]
    found = torch.zeros(len(cells), samples, 3, dtype=torch.float64, device=device)  # correct tokens, loss, tokens
    for cell, (length, depth) in enumerate(cells):
        for sample in range(samples):
            hay = generate(length, depth, source)
            ids = torch.tensor([hay.tokens], device=device)
            labels = torch.full_like(ids, IGNORE_INDEX)
            labels[:, -hay.answer :] = ids[:, -hay.answer :]
            scores = score_tokens(model, {"input_ids": ids, "labels": labels})
            found[cell, sample, 0] = scores.correct.sum()
            found[cell, sample, 1] = scores.loss.double().sum()
            found[cell, sample, 2] = scores.correct.numel()
    right, loss, tokens = sum_over_ranks(model, found).cpu().unbind(-1)
    return [
        {
            "length": length,
            "depth": depth,
            "samples": samples,
            "accuracy": (share := (right[cell] == tokens[cell]).double().mean().item()),
            "standard_error": math.sqrt(share * (1 - share) / samples),
            "loss": (loss[cell].sum() / tokens[cell].sum()).item(),
        }
        for cell, (length, depth) in enumerate(cells)
    ]


def plot_needle(cells: list[dict[str, float]], path: Path) -> None:
    """Plot a heat map of the accuracy over length and depth as a PNG."""
    from matplotlib.figure import Figure

    lengths, depths = (sorted({cell[key] for cell in cells}) for key in ("length", "depth"))
    figure = Figure(figsize=(2 + 0.8 * len(lengths), 1.6 + 0.5 * len(depths)), layout="constrained")
    axes = figure.subplots()
    grid = torch.zeros(len(depths), len(lengths))
    for cell in cells:
        row, column = depths.index(cell["depth"]), lengths.index(cell["length"])
        grid[row, column] = cell["accuracy"]
        axes.text(column, row, f"{cell['accuracy']:.0%}", ha="center", va="center")
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth of the needle")
    figure.colorbar(image, label="found")
    figure.savefig(path, dpi=120)


def needle(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of a LinearLlama3 or Llama model.")],
    length: Annotated[
        list[int], typer.Option(min=1, help="Tokens in a haystack. Repeat the option for several lengths.")
    ] = list(LENGTHS),  # noqa: B006
    depth: Annotated[
        list[float], typer.Option(min=0, max=1, help="Depth of the needle, from 0 to 1. Repeat for several depths.")
    ] = list(DEPTHS),  # noqa: B006
    samples: Annotated[int, typer.Option(min=1, help="Haystacks for each length and depth.")] = 8,
    tokens: Annotated[bool, typer.Option("--tokens", help="Use random tokens instead of English text.")] = False,
    seed: Annotated[int, typer.Option(help="Seed for the haystacks.")] = 0,
    output: Annotated[Path, typer.Option(help=f"Folder for {NAME}.json and {NAME}.png.")] = Path("."),
    processes: Processes = None,
) -> None:
    """Measure how often a model finds a fact in a long text, for each length of the text and depth of the fact.

    The standard error of this share is that of a binomial proportion.
    """
    with user_errors():
        check_inputs(model, output)
        haystacks = token_haystack(load_config(model).vocab_size) if tokens else text_haystack(load_tokenizer(model))
        haystacks(min(length), 0.0, random.Random(0))  # raises without room for needle and question
        loaded, _, writes = load_on_processes(model, processes)
    cells = needle_accuracy(loaded, haystacks, lengths=length, depths=depth, samples=samples, seed=seed)
    if not writes:
        return
    (output / f"{NAME}.json").write_text(json.dumps(cells, indent=1))
    plot_needle(cells, output / f"{NAME}.png")
    for cell in cells:
        found = plus_minus(100 * cell["accuracy"], 100 * cell["standard_error"], 0)
        print(f"{cell['length']:>9,} tokens, depth {cell['depth']:4.0%}: {found} % found, loss {cell['loss']:.3f}")
