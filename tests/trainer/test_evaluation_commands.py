"""`linear-llama3 evaluate` and `needle`: their numbers on one process and on two, and the arguments they refuse."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM, LinearLlama3ForSequenceClassification, cli
from linear_llama3.commands import evaluation, launching
from linear_llama3.commands.evaluation import evaluate
from linear_llama3.commands.needle import needle
from linear_llama3.trainer import launched
from tests.helpers.ranks import run_distributed
from tests.helpers.recipes import write_tokenizer
from tests.helpers.tiny import SIZES, tiny_model

SENTENCE = "the quick brown fox jumps over the lazy dog."
TEXTS = [SENTENCE * n for n in (1, 3, 2)]
LENGTH = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, a model `linear`, and a `llama`."""
    folder = tmp_path_factory.mktemp("evaluation")
    sizes = {**SIZES, "vocab_size": len(write_tokenizer(folder / "linear")), "pad_token_id": None}
    write_tokenizer(folder / "llama")
    tiny_model("gla", vocab_size=sizes["vocab_size"], pad_token_id=None).save_pretrained(folder / "linear")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).save_pretrained(folder / "llama")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def pieces(vocabulary: dict[str, int]) -> list[list[int]]:
    """Return pieces of documents that a model reads together: a token per letter, "_" at the end, in packed rows."""
    rows: list[list[list[int]]] = [[]]
    for text in TEXTS:
        rest = [vocabulary.get(letter, vocabulary["."]) for letter in text + "_"]
        while rest:
            room = LENGTH - sum(map(len, rows[-1]))
            rows[-1].append(rest[:room])
            rest = rest[room:]
            if sum(map(len, rows[-1])) == LENGTH:
                rows.append([])
    return [piece for row in rows[:-1] for piece in row if len(piece) > 1]


def mean_loss(model: nn.Module, documents: list[list[int]]) -> tuple[float, int]:
    """Return the mean loss by the model's own forward pass, document by document, and the number of targets."""
    total = 0.0
    for document in documents:
        ids = torch.tensor([document])
        total += model(input_ids=ids, labels=ids).loss.item() * (len(document) - 1)
    targets = sum(len(document) - 1 for document in documents)
    return total / targets, targets


@pytest.mark.parametrize("kind", ["linear", "llama"])
def test_the_mean_loss_is_that_of_the_models_own_forward(kind: str, folder: Path, tmp_path: Path) -> None:
    files = [folder / f"{number}.txt" for number in range(3)]
    done = run("evaluate", folder / kind, *files, "--length", LENGTH, "--output", tmp_path / "new" / "out")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "new" / "out" / "loss_by_context.json").read_text())
    documents = pieces(json.loads((folder / kind / "tokenizer.json").read_text())["model"]["vocab"])
    model = (LlamaForCausalLM if kind == "llama" else LinearLlama3ForCausalLM).from_pretrained(folder / kind).eval()
    loss, targets = mean_loss(model, documents)
    assert (result["tokens"], result["documents"]) == (targets, len(documents))
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert sum(bucket["tokens"] for bucket in result["by_context"]) == targets
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"loss {loss:.4f} ± {result['standard_error']:.4f}, perplexity {math.exp(loss):.2f} ± ")
    assert f"({targets:,} tokens of {len(documents)} documents)" in last
    assert (tmp_path / "new" / "out" / "loss_by_context.png").is_file()


def measured(folder: Path, output: Path, kind: str) -> None:
    """Run both commands on every rank, as `python -m` does under torchrun."""
    datasets.config.HF_DATASETS_CACHE = output / "cache"
    AcceleratorState._reset_state()
    evaluate(str(folder / kind), [str(folder / "1.txt")], length=LENGTH, output=output)
    AcceleratorState._reset_state()  # usually each command has its own process
    needle(str(folder / kind), [30, 61], [0.0, 1.0], samples=2, tokens=True, output=output)


def refused(folder: Path, output: Path) -> str:
    launched.GRACE = 0  # rank 1 need not wait until rank 0 has printed the error
    with pytest.raises(SystemExit) as ended:
        measured(folder, output, "llama")
    return str(ended.value)


def test_two_processes_give_the_numbers_of_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(folder, tmp_path / "one", "linear")
    assert "30 tokens, depth   0%: " in capsys.readouterr().out
    run_distributed(measured, 2, folder, tmp_path / "two", "linear")
    for name in ("loss_by_context.json", "needle.json"):
        one, two = (json.loads((tmp_path / where / name).read_text()) for where in ("one", "two"))
        numbers = [list(flat(result)) for result in (one, two)]
        assert len(numbers[0]) > 10 and numbers[1] == pytest.approx(numbers[0], rel=1e-5)
    for one, two in zip(
        *[json.loads((tmp_path / where / "needle.json").read_text()) for where in ("one", "two")], strict=True
    ):
        assert one["samples"] == 2 and one["standard_error"] == two["standard_error"]


def flat(result: Any) -> Any:
    if isinstance(result, (dict, list)):
        for part in result.values() if isinstance(result, dict) else result:
            yield from flat(part)
    elif result is not None:
        yield result


def test_a_llama_is_not_spread_over_processes(folder: Path, tmp_path: Path) -> None:
    for message in run_distributed(refused, 2, folder, tmp_path):
        assert message.startswith("error: sequence parallelism needs layers with a sequence_parallel_context")


class Loading(Exception):
    """The command builds its accelerator, the first step of its work."""


def load() -> None:
    raise Loading


def test_several_processes_run_the_same_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that finds no launcher starts one; in the processes of a launch it does its work."""
    launched: list[tuple[int, bool]] = []

    def launch(processes: int, *, gpu: bool) -> None:
        launched.append((processes, gpu))
        raise SystemExit(0)

    monkeypatch.setattr(launching, "launch", launch)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    book, out = folder / "1.txt", tmp_path / "out"
    run("evaluate", folder / "linear", book, "--length", 50, "--processes", 2, "--output", out)
    run("needle", folder / "linear", "--length", 400, "--tokens", "--processes", 3, "--output", out)
    assert launched == [(2, False), (3, False)]
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():  # torchrun has started this process already
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(evaluation, "place", lambda processes: pytest.fail("placed again"))
    monkeypatch.setattr("linear_llama3.trainer.accelerator.SequenceParallelAccelerator", load)
    assert isinstance(run("evaluate", folder / "linear", book, "--processes", 2, "--output", out).exception, Loading)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["evaluate", "none", "1.txt"], "error: the model must be a folder or a Hub name with a config, got 'none'", 1),
        (["evaluate", "linear", "none.txt"], "error: FILE... must name files, folders or patterns with files, got", 1),
        (["evaluate", "linear", "1.txt", "--length", "5000"], "error: the data must fill at least one row", 1),
        (["evaluate", "linear", "1.txt", "--length", "1"], "--length", 2),
        (["evaluate", "linear", "1.txt", "--rows", "0"], "--rows", 2),
        (["evaluate", "linear", "1.txt", "--output", "1.txt"], "error: --output must be a folder that can be", 1),
        (["evaluate", "linear"], "Missing argument", 2),
        (["evaluate", "classifier", "1.txt"], "needs all of its weights, got 'classifier' without lm_head.weight", 1),
        (["evaluate", "bare", "1.txt"], "error: tokenizer must be a folder or a Hub name with a", 1),
        (["evaluate", "narrow", "1.txt"], "for each of the tokenizer's 28 tokens, got vocab_size = 20", 1),
        (["evaluate", "linear", "1.txt", "--processes", "0"], "--processes", 2),
        (["needle", "linear", "--length", "1024", "--length", "9"], "error: a haystack of 9 tokens must hold", 1),
        (["needle", "linear", "--depth", "1.5"], "--depth", 2),
        (["needle", "linear", "--samples", "0"], "--samples", 2),
        (["needle", "none"], "error: the model must be a folder or a Hub name with a config, got 'none'", 1),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(
    arguments: list[str], message: str, code: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    config = LinearLlama3Config(**{**SIZES, "num_hidden_layers": 2})
    if "classifier" in arguments:
        LinearLlama3ForSequenceClassification(config).save_pretrained("classifier")
        write_tokenizer(Path("classifier"))
    if "bare" in arguments:
        config.save_pretrained("bare")
    if "narrow" in arguments:
        tiny_model("gla", vocab_size=20).save_pretrained("narrow")
        write_tokenizer(Path("narrow"))
    done = run(*arguments)
    text = str(done.exception) if code == 1 else done.output
    assert isinstance(done.exception, SystemExit) and message in " ".join(text.replace("│", " ").split())
    assert done.exit_code == code if code == 2 else "\n" not in text
