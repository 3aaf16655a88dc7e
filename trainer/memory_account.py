"""How many bytes a device needs to train a model, tensor by tensor, before anything is run.

`memory_layers.py` says which tensors the layers make and keep, `memory_tape.py` when they are alive. Here are the rest
of the model (embedding, final norm, head, loss) and what is alive all the time. The account is of a micro-batch behind
the first of an accumulation, when all gradients are there, with a label for every token.

    print(memory_account(config, tokens=131072, weights=torch.bfloat16, checkpointing=True, tiling=True).table())
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling import LinearLlama3Config, LinearLlama3ForCausalLM
from ..ops.tiles import tile_tokens
from .memory_layers import WORK, Graph, Setting, layer
from .memory_tape import EXCHANGED, Step, Tape

OPTIMIZER_STATES = {"adamw": 2, "sgd": 0}  # numbers for each one that is trained
INTEGER = 8  # bytes of a token id, a label, a position


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAccount:
    """Bytes on a device at the moment when they are most."""

    categories: dict[str, int]
    tensors: dict[str, int]  # the same, one by one, the largest first
    host: int  # bytes in the host's memory, of offloaded inputs of layers
    backend: str  # of linear attention, which is assumed

    @property
    def total(self) -> int:
        return sum(self.categories.values())

    def table(self, largest: int = 6) -> str:
        """Categories with their shares, and the `largest` tensors inside."""
        rows = [(name, size) for name, size in self.categories.items() if size]
        lines = [f"{name:<28}{size / 2**30:>9.2f} GiB {size / self.total:>6.1%}" for name, size in rows]
        lines.append(f"{'total':<28}{self.total / 2**30:>9.2f} GiB (linear attention: {self.backend})")
        if self.host:
            lines.append(f"{'in host memory':<28}{self.host / 2**30:>9.2f} GiB")
        top = [f"{name} {size / 2**30:.2f}" for name, size in list(self.tensors.items())[:largest]]
        return "\n".join([*lines, f"largest, GiB: {'; '.join(top)}"])


def memory_account(
    config: LinearLlama3Config,
    *,
    tokens: int,
    rows: int = 1,
    sequence_parallel: int = 1,
    data_parallel: int = 1,
    fsdp: bool = False,
    weights: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    optimizer: str = "adamw",
    trainable: int | None = None,
    checkpointing: bool = False,
    offload: bool = False,
    tiling: bool = False,
    chunked_loss: bool = True,
    packed: bool = False,
    backend: str = "triton",
) -> MemoryAccount:
    """The account of a causal language model under LASP-2 and LASP-2H.

    Not measured on a GPU: what allocators round up or leave unused between tensors, NCCL's own buffers and the CUDA
    context (together 1 to 3 GB as a rule) come on top.

    Args:
        tokens: T of a row, the whole sequence.
        rows: of a device's micro-batch.
        sequence_parallel: W, devices that share every sequence.
        data_parallel: groups of them.
        fsdp: weights, gradients and optimizer are spread over all devices (FSDP2), not held by each (DDP).
        weights: dtype of weights, gradients, optimizer and residual stream.
        compute: dtype of autocast (`bf16=True` of TrainingArguments with float32 weights); None: that of the weights.
        optimizer: "adamw" or "sgd" (without momentum).
        trainable: trained numbers, where they are not all (LoRA).
        checkpointing: every layer is computed again in the backward pass (`activation_checkpointing`),
        offload: and its input waits in the host's memory (`activation_checkpointing_kwargs={"offload": True}`).
        tiling: `sequence_tiling`.
        chunked_loss: the loss without logits; False: the model's logits and transformers' loss.
        packed: rows hold several documents.
        backend: of linear attention, "triton" (GPUs) or "chunked" (elsewhere).

    Raises:
        ValueError: an unknown optimizer or backend; offload without checkpointing.
    """
    _check(optimizer, backend, checkpointing=checkpointing, offload=offload)
    whole, layers, embedding = _count(config)
    local = -(-tokens // sequence_parallel) * rows
    number = weights.itemsize
    setting = Setting(
        config=config,
        tokens=local,
        rows=rows,
        ranks=sequence_parallel,
        weights=number,
        compute=(compute or weights).itemsize,
        tiling=tiling,
        packed=packed,
        triton=backend == "triton",
        learns=trainable is None,
    )
    trained, devices = whole if trainable is None else trainable, data_parallel * sequence_parallel
    shards = devices if fsdp else 1
    held = {
        "weights": whole * number // shards,
        "gradients": trained * number // shards,
        "optimizer": trained * number * OPTIMIZER_STATES[optimizer] // shards,
        "communication": 0,
        # ids, labels and positions of the whole batch and of this device's part; sines and cosines
        "batch": INTEGER * (3 * tokens * rows + 4 * local) + 2 * local * (config.head_dim or 0) * number,
    }
    if fsdp:  # a layer in use and the next one, with gradients before and after they are reduced; embedding or head
        held["communication"] = (4 * max(layers) + 2 * embedding) * number
    elif devices > 1:
        held["communication"] = trained * number  # DDP's buckets
    tape = _model(setting, checkpointing=checkpointing, offload=offload, chunked_loss=chunked_loss)
    if setting.compute != number and (checkpointing or tiling):  # autocast's copies of the weights, until the loss
        tape.steps[-1] = dataclasses.replace(tape.steps[-1], work=tape.steps[-1].work + sum(layers) * setting.compute)
    peak = tape.peak()
    categories = Counter(held)
    for name, size in peak.items():
        categories[_category(name)] += size
    inputs = config.num_hidden_layers * local * config.hidden_size * number
    return MemoryAccount(
        categories=dict(categories),
        tensors=dict((Counter(held) + peak).most_common()),
        host=inputs if offload else 0,
        backend=backend,
    )


def _check(optimizer: str, backend: str, *, checkpointing: bool, offload: bool) -> None:
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(f"optimizer must be one of {sorted(OPTIMIZER_STATES)}, got {optimizer!r}")
    if backend not in ("triton", "chunked"):
        raise ValueError(f"backend must be 'triton' (GPUs) or 'chunked' (elsewhere), got {backend!r}")
    if offload and not checkpointing:
        raise ValueError("offload=True moves what checkpointing keeps, got checkpointing=False; set it to True")


def _count(config: LinearLlama3Config) -> tuple[int, list[int], int]:
    """Numbers of the model, of its layers, and of the embedding."""
    with torch.device("meta"):
        model = LinearLlama3ForCausalLM(config)
    layers = [sum(p.numel() for p in x.parameters()) for x in model.model.layers]
    return model.num_parameters(), layers, model.model.embed_tokens.weight.numel()


def _model(setting: Setting, *, checkpointing: bool, offload: bool, chunked_loss: bool) -> Tape:
    config, number = setting.config, setting.weights
    size = setting.tokens * config.hidden_size * number
    embedding = config.vocab_size * config.hidden_size * number if setting.learns else 0
    steps = [Step(inputs=(), output="hidden 0", size=size, parameters=embedding)]
    kinds = config.layer_types or ()
    tapes = {kind: layer(setting, kind) for kind in set(kinds)}
    for index, kind in enumerate(kinds):
        x, output = f"hidden {index}", f"hidden {index + 1}"
        if not checkpointing:
            steps += _inlined(tapes[kind], f"layer {index}", {"x": x, "layer output": output})
            continue
        state = 0
        if setting.ranks > 1 and kind == "linear_attention":  # what it received is not sent again
            links = 1 + config.has_softmax_layers
            state = links * setting.rows * math.prod(config.linear_state_shape) * WORK
        kept: dict[str, Any] = {"backward_work": size} if offload else {"saves": (x,)}
        steps.append(Step(inputs=(x,), output=output, size=size, kept=state, inside=tapes[kind], **kept))
    last = f"hidden {config.num_hidden_layers}"
    graph = Graph("head", setting, setting.tokens, {last: (config.hidden_size, number)})
    (_chunked_head if chunked_loss else _plain_head)(graph, graph.tiles(Graph.norm, "normed", last))
    return Tape("model", {}, steps + graph.tape.steps)


def _inlined(tape: Tape, prefix: str, names: dict[str, str]) -> list[Step]:
    """The steps of a layer as steps of the model."""

    def name(x: str) -> str:
        return names.get(x, f"{prefix}: {x}")

    return [
        dataclasses.replace(
            step, inputs=tuple(map(name, step.inputs)), output=name(step.output), saves=tuple(map(name, step.saves))
        )
        for step in tape.steps
    ]


def _chunked_head(graph: Graph, x: str) -> None:
    """`ops/cross_entropy.py`: the gradients of hidden states and weights are kept, logits are those of a chunk."""
    setting, config = graph.setting, graph.setting.config
    head = config.vocab_size * config.hidden_size
    tokens = min(tile_tokens(config.vocab_size), graph.tokens)
    logits, item = tokens * config.vocab_size, setting.compute
    copy = item if item != WORK else 0
    gradient = head * setting.weights if setting.learns else 0
    cast = head * item if item != setting.weights else 0  # autocast's weights, and their gradients
    graph.step(
        "loss", [x], 0, WORK,
        kept=graph.tape.sizes[x] + (head * WORK if setting.learns else 0),
        # logits, their logarithms of probabilities in float32, their gradients; then those of the weights
        work=cast + max(logits * (item + WORK + copy), logits * 2 * item + gradient + cast)
        + tokens * config.hidden_size * item,
        backward_work=head * WORK if setting.learns else 0,
        parameters=gradient,
    )  # fmt: skip


def _plain_head(graph: Graph, x: str) -> None:
    """transformers' loss: logits, in float32, and the logarithms of probabilities, all with gradients."""
    vocabulary = graph.setting.config.vocab_size
    logits = graph.cast(graph.linear("logits", x, vocabulary), WORK)
    graph.step("log-probabilities", [logits], vocabulary, WORK, ["log-probabilities"])
    graph.step("loss", ["log-probabilities"], 0, WORK)


def _category(name: str) -> str:
    if name.endswith(EXCHANGED) or name.startswith("kept by hidden"):
        return "states exchanged"
    if name.startswith("hidden"):
        return "layer inputs"
    return "inside layers" if name.startswith(("layer", "d hidden", "d layer", "kept by layer")) else "head and loss"
