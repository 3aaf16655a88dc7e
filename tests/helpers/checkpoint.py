"""A tiny checkpoint made by the quickstart's script and recipe, and the texts for the tools that load it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.trainer.__main__ import main

ROOT = Path(__file__).parents[2]
SENTENCE = "You may add Your own copyright statement to Your modifications.\n"
TEXTS = [f"{i}. {SENTENCE}" * n for i, n in enumerate((3, 1, 4, 1, 2, 2, 1, 4))]  # at most 60 tokens each
QUESTIONS = [
    "def f(x):\n    return",
    "import torch\n\n\ndef train(model):\n    return",
    "return",
]  # of unlike lengths: padded
NEW_TOKENS = 6


def quickstart(folder: str) -> None:
    """Train tokenizer and model with the quickstart's script and recipe, on a fixed text and with weights large enough
    to tell layers apart."""
    train_tokenizer = runpy.run_path(str(ROOT / "scripts" / "quickstart_data.py"))["train_tokenizer"]
    train_tokenizer([ROOT / "LICENSE"], Path(folder) / "tokenizer")
    model = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.2, "gate_bias_init": -3.0}
    training = {"max_steps": 2, "output_dir": f"{folder}/model", "disable_tqdm": True}
    changes = {"tokenizer": f"{folder}/tokenizer", "data.files": str(ROOT / "LICENSE"), "sequence_length": 256}
    changes |= {f"model.{key}": value for key, value in model.items()}
    changes |= {f"training.{key}": value for key, value in training.items()}
    main(ROOT / "scripts/recipes/quickstart.yaml", [f"{key}={value}" for key, value in changes.items()])


def load(folder: str | Path) -> LinearLlama3ForCausalLM:
    """Load the model in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder)


def tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def documents(folder: str | Path) -> list[Tensor]:
    """Return `TEXTS` as tokens `[T]`, each with the end-of-sequence token at its end."""
    words = tokenizer(folder)
    return [words(text + words.eos_token, return_tensors="pt")["input_ids"][0] for text in TEXTS]


def continuations(checkpoint: Path) -> list[str]:
    """Return greedy continuations of `QUESTIONS`, with a forward pass over the complete text for each token."""
    model, words, texts = load(checkpoint), tokenizer(checkpoint), []
    for question in QUESTIONS:
        ids = words(question, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        texts.append(words.decode(ids[0, start:]))
    return texts


def loss_alone(model: torch.nn.Module, rows: list[Tensor]) -> Tensor:
    """Return the mean loss over all targets of documents, with a forward pass for each document."""
    losses = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum") for row in rows]
    return torch.stack(losses).sum() / sum(len(row) - 1 for row in rows)


def assert_documents_alone(
    runs: list[dict[str, Any]], model: torch.nn.Module, rows: list[Tensor], learning_rate: float
) -> None:
    """Compare every rank's losses, gradient norms and parameters (float32) with gradient descent on `loss_alone`.

    The reference runs in float64 and changes `model`. Parameters may be off by half a unit in the last place per step:
    a decay's bias near -3 is updated by as little as 2,000 such units. The norm of the second gradient follows from
    rounded parameters.
    """
    model.double()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    steps = len(runs[0]["history"])
    for step in range(steps):
        loss = loss_alone(model, rows)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for run in runs:
            assert run["history"][step] == pytest.approx((loss.item(), norm.item()), rel=2e-5)
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter.sub_(learning_rate * gradient)
    for name, parameter in parameters.items():
        update = parameter.detach() - before[name]
        rounding = steps * torch.finfo(torch.float32).eps / 2 * parameter.detach().norm()
        for run in runs:
            error = torch.from_numpy(run["parameters"][name]) - parameter.detach()
            assert error.norm() <= 1e-4 * update.norm() + rounding, (name, error.norm() / update.norm())
