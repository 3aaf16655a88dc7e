"""Loss of a model on text: its mean, and its course over the tokens of context.

One process, or all processes of a launch with every row sharded over them, give the same numbers:

    linear-llama3 evaluate MODEL book.txt --length 32768 --output runs/evaluation
    torchrun --nproc_per_node 8 -m linear_llama3.cli evaluate MODEL book.txt --length 1048576
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from ..modeling import LinearLlama3ForCausalLM
from ..modeling.loading import load_model, load_tokenizer, load_tokenizer_of
from ..ops.cross_entropy import IGNORE_INDEX
from ..ops.precision import working_dtype
from ..sequence_parallel import SequenceParallelContext, enable_sequence_parallel
from ..sequence_parallel.collectives import all_reduce
from ..trainer.command_line import user_errors
from ..trainer.launched import join_on_cpus, launched_processes
from .launching import Processes, place, start

PIECE = 2048  # tokens whose logits exist at once
BUCKETS = 63  # powers of two in an int64
NAME = "loss_by_context"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Scores of the n targets among this rank's tokens; all tensors are `[n]`."""

    loss: Tensor  # at least float32
    correct: Tensor  # bool: the target has the highest logit
    context: Tensor  # int64: preceding tokens in the target's document
    document: Tensor  # int64: number of the target's document in the batch
    documents: int  # number of documents in the batch, on all ranks together


@torch.no_grad()
def score_tokens(model: nn.Module, batch: Mapping[str, Any]) -> TokenScores:
    """Score the targets of a batch with a causal model.

    A model under a sequence-parallel context (`enable_sequence_parallel`) scores this rank's shard of every row; all
    ranks of the sequence pass the same batch.

    Args:
        model: a LinearLlama3ForCausalLM, or a LlamaForCausalLM for comparison.
        batch: a batch for `SequenceParallelContext.shard_batch`. `labels` default to all tokens that the
            `attention_mask` shows. `position_ids` start from 0 in every document.
    """
    from ..trainer.parallelism import check_peers  # imports accelerate, which the command line's help does not need

    model = known_model(model)
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
    document, documents = _documents(local, context)
    seen = local["position_ids"][chosen] + 1
    loss, correct, training = [], [], model.training
    model.eval()
    try:
        hidden = model.model(**local, use_cache=False).last_hidden_state[chosen]
        for tokens, target in zip(hidden.split(PIECE), targets[chosen].split(PIECE), strict=True):
            logits = model.lm_head(tokens)
            loss.append(F.cross_entropy(logits.to(working_dtype(logits)), target, reduction="none"))
            correct.append(logits.argmax(-1) == target)
    finally:
        model.train(training)
    return TokenScores(
        loss=torch.cat(loss),
        correct=torch.cat(correct),
        context=seen,
        document=document.expand(chosen.shape)[chosen],
        documents=documents,
    )


def known_model(model: nn.Module) -> LinearLlama3ForCausalLM | LlamaForCausalLM:
    """Return the model; raise ValueError if it is of a class that the evaluation does not know."""
    if not isinstance(model, LinearLlama3ForCausalLM | LlamaForCausalLM):
        raise ValueError(
            f"the model must be a LinearLlama3ForCausalLM or a LlamaForCausalLM, got a {type(model).__name__}; "
            "merge adapters with merge_and_unload() first"
        )
    return model


def _documents(local: Mapping[str, Any], context: SequenceParallelContext) -> tuple[Tensor, int]:
    """Return the document number of every local token, `[1, C]` or `[B, 1]`, and the number of documents in the batch.

    Padding may count as a document; it has no targets.
    """
    edges, positions = local.get("cu_seq_lens_q"), local["position_ids"]
    rows, tokens = positions.shape
    if edges is None:  # a document in each row
        return torch.arange(rows, device=positions.device)[:, None], rows
    places = context.positions(tokens, positions.device)
    return torch.bucketize(places, edges[1:-1], right=True)[None], len(edges) - 1


def sum_over_ranks(model: nn.Module, x: Tensor) -> Tensor:
    """Return the sum of `x` over the ranks of a sequence."""
    context = getattr(model.model, "sequence_parallel_context", None)
    return x if context is None or context.group is None else all_reduce(x, context.group).wait()


def measure_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean loss of all targets, and of those with 1, 2 to 3, 4 to 7, ... preceding tokens in their document.

    The standard errors treat documents as independent draws, and the tokens of a document as dependent. They are those
    of a ratio estimator: the sum of losses over the sum of tokens, linearized, with documents as the sampling units.
    The pieces of a document that is longer than a row count as documents; if they depend on each other, the true error
    is larger. For a single document the standard error is None.

    Returns:
        `loss` (nats per token) and its `standard_error`; `perplexity` = exp(loss) and its `perplexity_standard_error`
        (to first order); `tokens` (targets); `documents` (with a target); `by_context`, a list with `first` and `last`
        (tokens of context), `loss`, `standard_error`, `tokens` and `documents` of every bucket that has targets.
        All ranks of a sequence return the same values.
    """
    sums = [_sums(score_tokens(model, batch)) for batch in batches]
    if not sums or not (table := sum_over_ranks(model, torch.cat(sums)).cpu()).any():
        raise ValueError("the evaluation needs a row with a label, got none; give rows of two tokens or more")
    mean = _mean(table.sum(1))
    perplexity, error = math.exp(mean["loss"]), mean["standard_error"]
    return {
        **mean,
        "perplexity": perplexity,
        "perplexity_standard_error": None if error is None else perplexity * error,
        "by_context": [
            {"first": 2**n, "last": 2 ** (n + 1) - 1, **_mean(bucket)}
            for n, bucket in enumerate(table.unbind(1))
            if bucket.any()
        ],
    }


def _sums(scores: TokenScores) -> Tensor:
    """Return the number of targets and the sum of their losses, float64 `[documents, BUCKETS, 2]`."""
    edges = 2 ** torch.arange(1, BUCKETS, device=scores.context.device)
    cell = scores.document * BUCKETS + torch.bucketize(scores.context, edges, right=True)
    cells = scores.documents * BUCKETS
    tokens, losses = torch.bincount(cell, minlength=cells), torch.bincount(cell, scores.loss.double(), minlength=cells)
    return torch.stack([tokens.double(), losses], dim=-1).view(-1, BUCKETS, 2)


def _mean(sums: Tensor) -> dict[str, Any]:
    """Return the mean loss per token and its standard error, from token counts and loss sums `[documents, 2]`."""
    tokens, losses = sums[sums[:, 0] > 0].unbind(1)
    total, documents = tokens.sum(), len(tokens)
    loss = losses.sum() / total
    error = None
    if documents > 1:
        deviations = (losses - loss * tokens).square().sum()
        error = (deviations * documents / (documents - 1)).sqrt().div(total).item()
    return {"loss": loss.item(), "standard_error": error, "tokens": int(total), "documents": documents}


def plot_loss_by_context(buckets: list[dict[str, float]], path: Path) -> None:
    """Plot the loss over the tokens of context, on a logarithmic scale, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([math.sqrt(b["first"] * b["last"]) for b in buckets], [b["loss"] for b in buckets], "o-", linewidth=1.5)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of context", ylabel="mean loss of a token")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def check_inputs(model: str, output: Path) -> None:
    """Check the model's name and tokenizer and the output folder, before processes start or a model is loaded."""
    load_tokenizer_of(model)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output must be a folder that can be written to, got {output}: {error.strerror}") from error


def load_on_processes(name: str, processes: int | None) -> tuple[nn.Module, PreTrainedTokenizerBase, bool]:
    """Return model and tokenizer, with rows sharded over the launch, and True on the process that writes results.

    A process that no launcher has started is the only one, or starts `processes` with its own command line.
    """
    from ..trainer.accelerator import SequenceParallelAccelerator

    if launched_processes() == 1:
        start(*place(processes))
    join_on_cpus()
    accelerator = SequenceParallelAccelerator()
    model, tokenizer = known_model(load_model(name, accelerator.device)), load_tokenizer(name)
    if accelerator.sequence_parallel_context is not None:
        enable_sequence_parallel(model, accelerator.sequence_parallel_context)
    return model, tokenizer, accelerator.is_main_process


def plus_minus(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of a LinearLlama3 or Llama model.")],
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Text files, folders or patterns, not seen in training.")
    ],
    length: Annotated[int, typer.Option(min=2, help="Tokens per row; longer documents are cut into rows.")] = 8192,
    rows: Annotated[int, typer.Option(min=1, help="Maximum number of rows to read.")] = 16,
    output: Annotated[Path, typer.Option(help=f"Folder for {NAME}.json and {NAME}.png.")] = Path("."),
    processes: Processes = None,
) -> None:
    """Measure a model's mean loss and perplexity on text, with standard errors, and the loss by tokens of context.

    Standard errors treat documents as independent draws; the pieces of a document longer than a row count as documents.
    """
    with user_errors():
        from accelerate import PartialState

        from ..trainer.data.files import expand
        from ..trainer.data.training_rows import training_rows
        from ..trainer.recipes.recipe import DataRecipe

        check_inputs(model, output)
        expand(files, "FILE...")
        loaded, tokenizer, writes = load_on_processes(model, processes)
        with PartialState().main_process_first():  # the others read its cache
            found = training_rows(DataRecipe(files=files), tokenizer, length).with_format("torch")
    found, device = found.select(range(min(rows, len(found)))), next(loaded.parameters()).device
    result = measure_loss(loaded, ({key: x[None].to(device) for key, x in row.items()} for row in found))
    if not writes:
        return
    (output / f"{NAME}.json").write_text(json.dumps(result, indent=1))
    plot_loss_by_context(result["by_context"], output / f"{NAME}.png")
    for b in result["by_context"]:
        loss = plus_minus(b["loss"], b["standard_error"], 4)
        print(f"{b['first']:>9,} to {b['last']:>9,} tokens of context: loss {loss} ({b['tokens']:,} tokens)")
    loss = plus_minus(result["loss"], result["standard_error"], 4)
    perplexity = plus_minus(result["perplexity"], result["perplexity_standard_error"], 2)
    print(f"loss {loss}, perplexity {perplexity} ({result['tokens']:,} tokens of {result['documents']:,} documents)")
