"""The layers of a model as tapes: which tensors they make, and which of those autograd keeps.

What stands here follows `modeling/` step by step; a size is numbers a token x bytes a number x tokens. Left out is what
is small beside the hidden states: statistics of norms, tables of indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling import MIXERS, LinearLlama3Config
from ..modeling.mixers import DECAY_RANK
from ..ops.chunks import Chunks, chunk_size
from ..ops.feature_maps import FEATURE_MAPS
from ..ops.tiles import tile_tokens
from .memory_tape import Step, Tape

WORK = 4  # bytes of a number in the working precision: float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a layer runs on, and how."""

    config: LinearLlama3Config
    tokens: int  # C of this device, all rows together
    rows: int
    ranks: int  # W that share a sequence
    weights: int  # bytes of a number in weights, gradients and the residual stream,
    compute: int  # and in matrix products: other than `weights` under autocast
    tiling: bool
    packed: bool
    triton: bool
    learns: bool  # all weights, not adapters alone


class Graph:
    """A tape whose tensors have `widths` (numbers a token) and `items` (bytes a number)."""

    def __init__(self, name: str, setting: Setting, tokens: int, sources: dict[str, tuple[int, int]]) -> None:
        self.setting, self.tokens = setting, tokens
        self.kinds = dict(sources)  # name -> (width, item)
        self.tape = Tape(name, {x: tokens * width * item for x, (width, item) in sources.items()})

    def step(
        self, output: str, inputs: Sequence[str], width: int, item: int, saves: Sequence[str] = (), **more: Any
    ) -> str:
        self.kinds[output] = width, item
        size = self.tokens * width * item
        self.tape.steps.append(Step(inputs=tuple(inputs), output=output, size=size, saves=tuple(saves), **more))
        return output

    def cast(self, x: str, item: int, output: str | None = None) -> str:
        width, now = self.kinds[x]
        return x if now == item else self.step(output or f"{x} in {8 * item} bits", [x], width, item)

    def norm(self, output: str, x: str) -> str:
        """LlamaRMSNorm: x in float32, divided, in its own precision again, times the weights."""
        width, item = self.kinds[x]
        precise, last = max(WORK, item), max(item, self.setting.weights)
        x = self.cast(x, precise)
        work = self.tokens * width * precise  # squares forward; two products backward
        n = self.step(f"{output}, divided", [x], width, precise, [x], work=work, backward_work=2 * work)
        n = self.cast(n, item)
        return self.step(output, [n], width, last, [n], backward_work=self.tokens * width * last)

    def linear(self, output: str, x: str, width: int) -> str:
        """Keeps its input, under autocast also the weights in half precision."""
        setting = self.setting
        x = self.cast(x, setting.compute, f"{x} for {output}")
        weight = self.kinds[x][0] * width
        kept = weight * setting.compute if setting.compute != setting.weights else 0
        gradient = weight * setting.weights if setting.learns else 0
        return self.step(output, [x], width, setting.compute, [x], kept=kept, parameters=gradient)

    def activation(self, output: str, x: str, name: str) -> str:
        """Keeps its input, a sigmoid its output."""
        return self.step(output, [x], *self.kinds[x], [output if name == "sigmoid" else x])

    def product(self, output: str, a: str, b: str) -> str:
        (width, item), (_, other) = self.kinds[a], self.kinds[b]
        return self.step(output, [a, b], width, max(item, other), [a, b])

    def residual(self, output: str, x: str, branch: str) -> str:
        width, item = self.kinds[x]
        return self.step(output, [x, self.cast(branch, item)], width, item, aliases=True)

    def rotate(self, output: str, x: str) -> str:
        """x cos + rotate_half(x) sin, in the precision of the table, then of x."""
        width, item = self.kinds[x]
        size = self.tokens * width * max(item, self.setting.weights)
        return self.step(output, [x], width, item, work=3 * size, backward_work=2 * size)

    def tiles(self, build: Callable[..., str], output: str, *inputs: str) -> str:
        """What `build(graph, output, *inputs)` adds, done in tiles (`ops/tiles.py`) where they are switched on."""
        size = tile_tokens(self.setting.config.intermediate_size)
        if not self.setting.tiling or self.tokens <= size:
            return build(self, output, *inputs)
        inside = Graph("tile", self.setting, size, {x: self.kinds[x] for x in inputs})
        build(inside, output, *inputs)
        parameters = sum(step.parameters for step in inside.tape.steps)
        more: dict[str, Any] = {"inside": inside.tape, "pieces": True, "parameters": parameters}
        return self.step(output, inputs, *inside.kinds[output], inputs, **more)


def layer(setting: Setting, kind: str) -> Tape:
    """A decoder layer, from "x" to "layer output"; `kind` is an entry of `config.layer_types`."""
    graph = Graph("layer", setting, setting.tokens, {"x": (setting.config.hidden_size, setting.weights)})
    y = graph.tiles(Graph.norm, "normed x", "x")
    attention = (linear_attention if kind == "linear_attention" else softmax_attention)(graph, y)
    h = graph.residual("h", "x", attention)
    graph.tiles(_feed_forward, "layer output", h)
    return graph.tape


def _feed_forward(graph: Graph, output: str, h: str) -> str:
    config = graph.setting.config
    y = graph.norm("normed h", h)
    activated = graph.activation("activated gate", graph.linear("gate", y, config.intermediate_size), config.hidden_act)
    product = graph.product("gate * up", activated, graph.linear("up", y, config.intermediate_size))
    return graph.residual(output, h, graph.linear("down", product, config.hidden_size))


def linear_attention(graph: Graph, y: str) -> str:
    """`LinearAttention.forward`."""
    setting, config = graph.setting, graph.setting.config
    mixer, heads = MIXERS[config.linear_attention_type], config.num_attention_heads
    kv_heads, key_dim, value_dim = config.linear_sizes
    v = graph.linear("v", y, kv_heads * value_dim)
    if mixer.normalize:
        v = graph.cast(v, WORK)
        v = graph.step("v with ones", [v], kv_heads * (value_dim + 1), WORK)
    k = _features(graph, graph.linear("k projected", y, kv_heads * key_dim), "k", kv_heads)
    learned = [_log_decay(graph, y)] if mixer.learned_decay else []
    q = _features(graph, graph.linear("q projected", y, heads * key_dim), "q", heads)

    gated = config.linear_output_gate
    gate = _gate(graph, y) if gated and not setting.tiling else None
    out = _attend_linearly(graph, [q, k, v, *learned])
    if mixer.normalize:
        out = graph.step("out / weights", [out], heads * value_dim, WORK, [out], backward_work=graph.tape.sizes[out])
    out = graph.cast(out, setting.compute)

    def finish(graph: Graph, output: str, out: str, *rest: str) -> str:
        gates = [_gate(graph, *rest)] if gated and setting.tiling else rest
        out = graph.norm("normed out", out) if config.uses_linear_output_norm else out
        for gate in gates:
            out = graph.product("gated out", out, gate)
        return graph.linear(output, out, config.hidden_size)

    if setting.tiling:
        return graph.tiles(finish, "attention", out, *([y] if gated else []))
    return finish(graph, "attention", out, *([gate] if gate else []))


def _gate(graph: Graph, y: str) -> str:
    config = graph.setting.config
    mixer, width = MIXERS[config.linear_attention_type], config.num_attention_heads * config.linear_sizes[2]
    return graph.activation("output gate", graph.linear("output gate projected", y, width), mixer.output_gate)


def _features(graph: Graph, x: str, output: str, heads: int) -> str:
    """Feature map and rotary embedding of queries or keys."""
    config = graph.setting.config
    if config.feature_map != "identity":
        width, item = graph.kinds[x]
        if config.feature_map not in ("silu", "elu_plus_one"):  # work in float32
            x, item = graph.cast(x, WORK), WORK
        features = heads * FEATURE_MAPS[config.feature_map].size(width // heads)
        work = graph.tokens * features * item if features > width else 0  # the pieces they are put together from
        x = graph.step(output, [x], features, item, [x], work=work, backward_work=work)
    return graph.rotate(f"{output} rotated", x) if config.uses_linear_rope else x


def _log_decay(graph: Graph, y: str) -> str:
    """GLA's: a projection through few channels, then logsigmoid in float32, which keeps a buffer of its own."""
    config, setting = graph.setting.config, graph.setting
    kv_heads, key_dim, _ = config.linear_sizes
    width = kv_heads * key_dim
    gate = graph.linear("decay up", graph.linear("decay down", y, DECAY_RANK), width)
    gate = graph.step("decay + bias", [gate], width, max(setting.compute, setting.weights))
    gate = graph.cast(gate, WORK)
    buffer = 0 if setting.triton else graph.tokens * width * WORK  # on CPUs only
    return graph.step("log decay", [graph.step("logsigmoid", [gate], width, WORK, [gate], kept=buffer)], width, WORK)


def _attend_linearly(graph: Graph, inputs: list[str]) -> str:
    """The op, with the states that it keeps and those that ranks exchange."""
    setting, config, tokens = graph.setting, graph.setting.config, graph.tokens
    heads, (kv_heads, features, columns) = config.num_attention_heads, config.linear_state_shape
    state = kv_heads * features * columns  # numbers, of a row
    q, k, v = (tokens * graph.kinds[x][0] for x in inputs[:3])
    out = tokens * heads * columns
    item = graph.kinds[inputs[2]][1]
    links = 2 if setting.ranks > 1 and config.has_softmax_layers else 1  # the layout is zigzag then
    message = links * setting.rows * (state + kv_heads * features) * WORK
    exchanged = (setting.ranks + 2) * message if setting.ranks > 1 else 0  # all ranks', one's own, those that enter
    if setting.triton:
        from ..ops.triton.configurations import configuration
        from ..ops.triton.tiles import CHANNEL, HEAD, NONE

        mixer = MIXERS[config.linear_attention_type]
        gate = CHANNEL if mixer.learned_decay else HEAD if mixer.constant_log_decay else NONE
        chunk = configuration(
            gate, features, columns, wide=item > 2, gate_gradient=mixer.learned_decay, capability=90
        ).chunk
        stored = -(-tokens // chunk) * state * item  # before each chunk, and the gradients behind each
        sizes = {"backward_work": 2 * stored, "exchanged": exchanged}
        return graph.step("out", inputs, heads * columns, item, inputs, **sizes)
    size = chunk_size((0, tokens), key_dim=features, groups=heads // kv_heads)
    width = setting.rows * heads * features
    block = min(Chunks((0, min(tokens, 4096)), torch.device("cpu"), size=size, width=width).per_block * size, tokens)
    share, states = block / tokens * WORK, block // size * setting.rows * state * WORK
    per_channel = len(inputs) > 3  # sums and factors of such decays, and what their gradient is put together from
    gate = 2 * q + 11 * k if per_channel else 0
    sizes = {
        "kept": -(-tokens // block) * setting.rows * state * WORK,  # one before every block
        "work": int(share * (2 * q + 2 * k + v + out)) + 2 * states,
        "backward_work": int(share * (2 * q + 3 * k + 2 * v + out + gate)) + (2 if per_channel else 3) * states,
        "exchanged": exchanged,
    }
    return graph.step("out", inputs, heads * columns, WORK, inputs, **sizes)


def softmax_attention(graph: Graph, y: str) -> str:
    """`LinearLlama3Attention.forward`: torch's flash attention, or ours for packed documents and several ranks."""
    setting, config, tokens = graph.setting, graph.setting.config, graph.tokens
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert kv_heads is not None and dim is not None
    q = graph.rotate("q", graph.linear("q projected", y, heads * dim))
    k = graph.rotate("k", graph.linear("k projected", y, kv_heads * dim))
    v = graph.linear("v", y, kv_heads * dim)
    item, lse = setting.compute, tokens * heads * WORK
    width, pairs = heads * dim, 2 * kv_heads * dim  # of an output, and of K and V together
    inputs = [q, k, v]
    if not (setting.packed or setting.ranks > 1):
        expanded = tokens * 2 * width * item if heads > kv_heads else 0  # gradients of K and V, a head for each query's
        out = graph.step("out", inputs, width, item, [*inputs, "out"], kept=lse, backward_work=expanded)
        return graph.linear("attention", out, config.hidden_size)
    # ours sums outputs and gradients in float32; on CPUs the operands are float32 as well
    operands = 0 if setting.triton or item == WORK else tokens * (width + pairs) * WORK
    remote = (setting.ranks - 1) * tokens * pairs  # the K and V of others that the last rank sees, numbers
    gathered = setting.ranks * tokens * pairs if setting.ranks > 1 else 0
    more = {
        "kept": lse + remote * item,
        "work": tokens * width * WORK + operands,  # one tile's output beside their sum
        # in float32, a tile's and their sum, which is cast at last
        "backward_work": operands + tokens * (width + pairs) * (2 * WORK - item),
        "exchanged": max(2 * gathered * item, (2 * gathered + tokens * pairs) * WORK) if gathered else 0,
    }
    out = graph.step("out", inputs, width, WORK, [*inputs, "out"], **more)
    return graph.linear("attention", graph.cast(out, item), config.hidden_size)
