"""Does the loss keep falling with context? The mean loss of tokens by how much of their document they can see.

On one process, or with every row spread over all processes of the launch, with the same numbers:

    python -m linear_llama3.trainer.evaluation MODEL book.txt --length 32768 --output runs/evaluation
    torchrun --nproc_per_node 8 -m linear_llama3.trainer.evaluation MODEL book.txt --length 1048576
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from ..modeling import LinearLlama3ForCausalLM
from ..ops.precision import working_dtype
from ..sequence_parallel import SequenceParallelContext, enable_sequence_parallel
from ..sequence_parallel.collectives import all_reduce
from ..sequence_parallel.context import IGNORE_INDEX
from .accelerator import SequenceParallelAccelerator
from .data import training_rows
from .launched import join_on_cpus
from .parallelism import check_peers
from .recipe import DataRecipe

PIECE = 2048  # tokens whose logits exist at once
BUCKETS = 63  # powers of two in an int64
NAME = "loss_by_context"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Of the targets among this rank's tokens: all are `[n]`."""

    loss: Tensor  # at least float32
    correct: Tensor  # bool: the target has the highest logit
    context: Tensor  # int64: tokens of its document before the target


def score_tokens(model: nn.Module, batch: Mapping[str, Any]) -> TokenScores:
    """What a causal model makes of the targets of a batch.

    A model under a sequence-parallel context (`enable_sequence_parallel`) scores this rank's part of every row; all
    ranks of the sequence give the same batch.

    Args:
        model: a LinearLlama3ForCausalLM, or a LlamaForCausalLM to compare with.
        batch: as `SequenceParallelContext.shard_batch` takes it; `labels` are by default all tokens that the
            `attention_mask` shows. `position_ids` start from 0 in every document.
    """
    if not isinstance(model, LinearLlama3ForCausalLM | LlamaForCausalLM):
        raise ValueError(
            f"the evaluation takes a LinearLlama3ForCausalLM or a LlamaForCausalLM, got a {type(model).__name__}; "
            "merge adapters with merge_and_unload() first"
        )
    context = getattr(model.model, "sequence_parallel_context", None) or SequenceParallelContext(None)
    check_peers(context, batch)
    batch = dict(batch)
    if batch.get("labels") is None and batch.get("shift_labels") is None:
        labels, mask = batch["input_ids"], batch.get("attention_mask")
        batch["labels"] = labels if mask is None else labels.masked_fill(mask == 0, IGNORE_INDEX)
    local = context.shard_batch(batch)
    targets = local.pop("shift_labels")
    local.pop("labels", None)
    chosen = targets != IGNORE_INDEX
    seen = local["position_ids"][chosen] + 1
    with _evaluating(model):
        hidden = model.model(**local, use_cache=False).last_hidden_state[chosen]
        pieces = zip(hidden.split(PIECE), targets[chosen].split(PIECE), strict=True)
        scores = [_score(model.lm_head(tokens), target) for tokens, target in pieces]
    loss, correct = (torch.cat(parts) for parts in zip(*scores, strict=True))
    return TokenScores(loss=loss, correct=correct, context=seen)


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.to(working_dtype(logits))
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def sum_over_ranks(model: nn.Module, x: Tensor) -> Tensor:
    """The sum of what the ranks of a sequence have."""
    context = getattr(model.model, "sequence_parallel_context", None)
    return x if context is None or context.group is None else all_reduce(x, context.group).wait()


def loss_by_context(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The mean loss of the targets that have 1, 2 to 3, 4 to 7, ... tokens of their document before them.

    Returns:
        `first`, `last` (tokens of context), `tokens`, `loss` of every bucket that has tokens; the same on every rank of
        a sequence. Perplexity is exp(loss).
    """
    total = torch.zeros(2, BUCKETS, dtype=torch.float64)
    for batch in batches:
        scores = score_tokens(model, batch)
        total = total.to(scores.loss.device)
        edges = 2 ** torch.arange(1, BUCKETS, device=total.device)
        bucket = torch.bucketize(scores.context, edges, right=True)
        total[0] += torch.bincount(bucket, minlength=BUCKETS)
        total[1] += torch.bincount(bucket, weights=scores.loss.double(), minlength=BUCKETS)
    tokens, losses = sum_over_ranks(model, total).tolist()
    if not any(tokens):
        raise ValueError("the evaluation needs a row with a label, got none; give rows of two tokens or more")
    return [
        {"first": 2**n, "last": 2 ** (n + 1) - 1, "tokens": int(tokens[n]), "loss": losses[n] / tokens[n]}
        for n in range(BUCKETS)
        if tokens[n]
    ]


def plot_loss_by_context(buckets: list[dict[str, float]], path: Path) -> None:
    """The loss over the tokens of context, on a logarithmic scale, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([math.sqrt(b["first"] * b["last"]) for b in buckets], [b["loss"] for b in buckets], "o-", linewidth=1.5)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of context", ylabel="mean loss of a token")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def load_for_evaluation(name: str) -> tuple[LinearLlama3ForCausalLM, PreTrainedTokenizerBase, bool]:
    """Model and tokenizer of a folder or Hub name, every row spread over the launch; and whether to write results."""
    join_on_cpus()
    accelerator = SequenceParallelAccelerator()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = LinearLlama3ForCausalLM.from_pretrained(name).to(accelerator.device).eval()
    if accelerator.sequence_parallel_context is not None:
        enable_sequence_parallel(model, accelerator.sequence_parallel_context)
    return model, tokenizer, accelerator.is_main_process


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m linear_llama3.trainer.evaluation", description=__doc__)
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("files", nargs="+", help="text: files, folders, patterns; long documents, unseen in training")
    parser.add_argument("--length", type=int, default=8192, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=16, help="rows to read")
    parser.add_argument("--output", type=Path, default=Path("."), help=f"folder of {NAME}.json and {NAME}.png")
    args = parser.parse_args(arguments)
    model, tokenizer, writes = load_for_evaluation(args.model)
    rows = training_rows(DataRecipe(files=args.files), tokenizer, args.length).with_format("torch")
    rows = rows.select(range(min(args.rows, len(rows))))
    batches = ({key: x[None].to(model.device) for key, x in row.items()} for row in rows)
    buckets = loss_by_context(model, batches)
    if writes:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"{NAME}.json").write_text(json.dumps(buckets, indent=1))
        plot_loss_by_context(buckets, args.output / f"{NAME}.png")
        for b in buckets:
            print("{first:>9,} to {last:>9,} tokens of context: loss {loss:.4f} ({tokens:,} tokens)".format(**b))


if __name__ == "__main__":
    from .__main__ import leave

    main()
    leave()
