"""Sharded prefill: the cache on the destination rank, and the text generated from it, equal those of one device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.modeling import RecurrentCache, prefill
from linear_llama3.modeling.cache import ShardedCache
from linear_llama3.ops.chunked import ChunkedForward
from linear_llama3.sequence_parallel import (
    LAYOUTS,
    LINEAR_STRATEGIES,
    SOFTMAX_STRATEGIES,
    SequenceParallelConfig,
    SequenceParallelContext,
    enable_sequence_parallel,
)
from linear_llama3.sequence_parallel.linear import attention as linear_layer
from tests.helpers.attention_cases import relative_error
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed, strided_group
from tests.helpers.tiny import MIXER_NAMES, SIZES, tiny_model, tokens

STEPS = 6
LENGTHS = (2, 3, 24, 30)  # caches of one token, of fewer tokens than ranks, of odd lengths
Errors = dict[str, float]


def exact_norm(self: LlamaRMSNorm, x: Tensor) -> Tensor:
    """transformers' computes in float32, where differences of double precision grow to those of float32."""
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def sharded(
    model: LinearLlama3ForCausalLM, x: Tensor, config: SequenceParallelConfig | None, group: Any = None, **options: Any
) -> DynamicCache | None:
    """Prefill as in the documentation of `prefill`."""
    enable_sequence_parallel(model, SequenceParallelContext(group or dist.group.WORLD, config))
    cache = prefill(model, x, **options)
    enable_sequence_parallel(model, None)
    return cache


@torch.no_grad()
def one_device(model: LinearLlama3ForCausalLM, x: Tensor) -> DynamicCache:
    cache: DynamicCache = model(x[:, :-1], use_cache=True).past_key_values
    return cache


def generate(model: LinearLlama3ForCausalLM, x: Tensor, **options: Any) -> Any:
    defaults = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(x, **{**defaults, **options})


def errors(model: LinearLlama3ForCausalLM, x: Tensor, cache: DynamicCache | None) -> Errors | None:
    """Compare the cache with that of one device: every kind of tensor, the next logits, the text."""
    if cache is None:
        return None
    expected = one_device(model, x)
    assert type(cache) is type(expected)
    assert cache.get_seq_length() == expected.get_seq_length() == x.shape[1] - 1
    found: Errors = {}

    def compare(name: str, got: Tensor, reference: Tensor) -> None:
        assert (got.shape, got.dtype) == (reference.shape, reference.dtype), name
        found[name] = max(found.get(name, 0.0), relative_error(got, reference))

    for got, reference in zip(cache.layers, expected.layers, strict=True):
        if isinstance(got, LinearAttentionCacheLayerMixin):
            assert got.has_previous_state[0]
            compare("state", got.recurrent_states[0], reference.recurrent_states[0])
        else:
            compare("keys", got.keys, reference.keys)
            compare("values", got.values, reference.values)
    options = {"return_dict_in_generate": True, "output_logits": True}
    text, reference = generate(model, x, past_key_values=cache, **options), generate(model, x, **options)
    compare("logits", torch.stack(text.logits), torch.stack(reference.logits))
    found["text"] = (text.sequences != reference.sequences).sum().item()
    return found


def compare_models(
    mixer: str, intervals: tuple[int, ...], dtype: torch.dtype, configs: Sequence[SequenceParallelConfig | None]
) -> list[Errors | None]:
    found = []
    for interval in intervals:
        model = tiny_model(mixer, full_attention_interval=interval).to(dtype)
        for n, config in enumerate(configs):
            for length in LENGTHS:
                x, dst = tokens(2, length), n % dist.get_world_size()
                cache = sharded(model, x, config, dst=dst)
                assert (cache is not None) == (dist.get_rank() == dst)
                found.append(errors(model, x, cache))
    return found


def compare_in_double(*args: Any) -> list[Errors | None]:
    with patch.object(LlamaRMSNorm, "forward", exact_norm):
        return compare_models(*args)


def check(by_rank: list[list[Errors | None]], bound: float) -> None:
    found = [errors for results in by_rank for errors in results if errors is not None]
    assert len(found) == len(by_rank[0])  # one rank has the cache
    for errors in found:
        assert errors.pop("text") == 0
        assert max(errors.values()) < bound, errors


ON_BOTH_LAYOUTS = [SequenceParallelConfig(layout=layout) for layout in LAYOUTS]
EVERY_STRATEGY = [
    SequenceParallelConfig(linear=linear, softmax=softmax, layout=layout)
    for layout in LAYOUTS
    for linear, softmax in zip([*LINEAR_STRATEGIES, "auto"], SOFTMAX_STRATEGIES, strict=True)
]


@slow_unless(
    lambda ranks, mixer: ranks == 3 and mixer in ("gla", "lightning", "rebased"), ranks=[2, 3, 4], mixer=MIXER_NAMES
)
def test_the_cache_equals_that_of_one_device(ranks: int, mixer: str) -> None:
    """Hybrids and purely linear models; every rank receives the cache in turn."""
    check(run_distributed(compare_in_double, ranks, mixer, (2, 0), torch.float64, ON_BOTH_LAYOUTS), 1e-10)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_cache_is_the_same_for_every_strategy_and_layout(ranks: int) -> None:
    check(run_distributed(compare_in_double, ranks, "gla", (2,), torch.float64, EVERY_STRATEGY), 1e-10)


@slow_unless(lambda mixer: mixer == "gla", mixer=MIXER_NAMES)
def test_the_cache_in_float32(mixer: str) -> None:
    """One device differs as much from float64 in the worst state: four layers divide a single token by its norm."""
    check(run_distributed(compare_models, 3, mixer, (2, 0), torch.float32, [None]), 1e-4)


def in_bfloat16(layout: str) -> list[float] | None:
    """Return the errors of the first two layers, whose inputs are equal or nearly equal on both sides."""
    model, x = tiny_model("gla").bfloat16(), tokens(2, 30)
    cache, expected = sharded(model, x, SequenceParallelConfig(layout=layout)), one_device(model, x)
    if cache is None:
        return None
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32
    assert cache.layers[1].keys.dtype == cache.layers[1].values.dtype == torch.bfloat16
    pairs = [
        (cache.layers[0].recurrent_states[0], expected.layers[0].recurrent_states[0]),
        (cache.layers[1].keys, expected.layers[1].keys),
        (cache.layers[1].values, expected.layers[1].values),
    ]
    return [relative_error(a.float(), b.float()) for a, b in pairs]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cache_in_bfloat16(layout: str) -> None:
    state, keys, values = run_distributed(in_bfloat16, 3, layout)[0]
    assert state < 1e-6
    assert max(keys, values) < 5e-3


def on_the_kernels(mixer: str) -> list[Errors | None]:
    with patch.object(linear_layer, "choose_backend", lambda *args, **kwargs: "triton"):
        return compare_models(mixer, (2,), torch.float32, ON_BOTH_LAYOUTS)


@slow_unless(lambda mixer: mixer == "lightning", mixer=["gla", "lightning"])
def test_the_cache_with_triton_kernels(mixer: str) -> None:
    launch = pytest.importorskip("linear_llama3.ops.triton.launch")
    if not launch.INTERPRETED:
        pytest.skip("gloo shares tensors of the CPU")
    check(run_distributed(on_the_kernels, 2, mixer), 1e-4)


def two_groups() -> list[Errors | None]:
    """Ranks (0, 2) and (1, 3), each with another prompt."""
    with patch.object(LlamaRMSNorm, "forward", exact_norm):
        model, mine = tiny_model("gla").double(), dist.get_rank() % 2
        x = tokens(1, 17 + mine, seed=mine)
        return [errors(model, x, sharded(model, x, None, strided_group(), dst=1))]


def test_groups_need_not_be_consecutive() -> None:
    by_rank = run_distributed(two_groups, 4)
    assert by_rank[0] == by_rank[1] == [None]
    check(by_rank[0:3:2], 1e-10)
    check(by_rank[1:4:2], 1e-10)


def ways_to_continue() -> list[bool] | None:
    same = []
    for interval in (2, 0):
        model, x = tiny_model("gla", full_attention_interval=interval), tokens(2, 15)
        longer = torch.cat([x, tokens(2, 4, seed=5)], 1)
        cache = functools.partial(sharded, model, x, None)
        for then, copies, options in (
            (x, 1, {"attention_mask": torch.ones_like(x)}),
            (longer, 1, {}),
            (x, 3, {"num_beams": 3}),
            (x, 2, {"do_sample": True, "num_return_sequences": 2}),
        ):
            if (past := cache()) is None:
                continue
            if copies > 1:
                past.batch_repeat_interleave(copies)
            texts = []
            for given in ({"past_key_values": past}, {}):
                torch.manual_seed(0)
                texts.append(generate(model, then, **given, **options))
            same.append(torch.equal(*texts))
        one, past = x[:, :1], sharded(model, x[:, :1], None)
        if past is not None:  # nothing to prefill
            assert past.get_seq_length() == 0
            same.append(torch.equal(generate(model, one, past_key_values=past), generate(model, one)))
    return same or None


def test_ways_to_continue() -> None:
    """The same prompt, a longer one, beams, samples; a prompt of one token."""
    assert run_distributed(ways_to_continue, 2) == [[True] * 10, None]


def spared() -> tuple[int, int]:
    """Return the largest number of tokens whose keys this rank held in one tensor, and its number of state scans."""
    model, seen = tiny_model("gla"), []
    update = DynamicCache.update

    def watched(self: DynamicCache, keys: Tensor, *args: Any) -> Any:
        seen.append(keys)
        return update(self, keys, *args)

    with (
        patch.object(DynamicCache, "update", watched),
        patch.object(ChunkedForward, "summary", autospec=True, side_effect=ChunkedForward.summary) as scans,
    ):
        sharded(model, tokens(1, 33), None, dst=1)
    return max(x.shape[2] for x in seen), scans.call_count


def test_only_one_rank_holds_all_keys() -> None:
    """The final state comes from the scan that the exchange needs anyway: one in each of two layers."""
    assert run_distributed(spared, 4) == [(8, 2), (32, 2), (8, 2), (8, 2)]


def refusal(case: str) -> str:
    model, x, rank = tiny_model("gla"), tokens(2, 9), dist.get_rank()
    context = SequenceParallelContext(dist.group.WORLD)
    if case == "no head":
        model = model.model
    if case != "no context":
        enable_sequence_parallel(model, context)
    options: dict[str, Any] = {}
    if case == "training":
        model.train()
    elif case == "padding":
        x[0, :3] = SIZES["pad_token_id"]
    elif case == "mask":
        options["attention_mask"] = torch.ones_like(x).index_fill(1, torch.tensor([8]), 0)
    elif case == "one sequence":
        x = x[0]
    elif case == "rank":
        options["dst"] = 2
    elif case == "other prompt":
        x[1, 4] += rank
    elif case == "other dst":
        options["dst"] = rank
    try:
        if case == "generate":
            prefill(model, x)
            generate(model, x)
        elif case == "packed":
            local = context.shard_batch({"input_ids": x, "position_ids": torch.arange(9).remainder(5)[None]})
            model(**local, past_key_values=ShardedCache(model.config, 9))
        prefill(model, x, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no context", "without one; call enable_sequence_parallel(model, context) first"),
        ("no head", "got a LinearLlama3Model, which does not generate"),
        ("training", "got one in training mode; call model.eval()"),
        ("padding", "takes prompts of one length, got padding in (2, 9) input_ids"),
        ("mask", "takes prompts of one length, got padding in (2, 9) input_ids"),
        ("one sequence", "takes prompts [B, T] of at least one token, got shape (9,)"),
        ("rank", "dst must be a rank of the group, 0 to 1, got 2"),
        ("other prompt", "got other input_ids or another dst than its peers"),
        ("other dst", "got other input_ids or another dst than its peers"),
        ("generate", "one rank's shard cannot generate, got generate() under a context"),
        ("packed", "a packed batch takes no cache"),
    ],
)
def test_unsupported_calls_are_refused(case: str, message: str) -> None:
    for said in run_distributed(refusal, 2, case):
        assert message in said


def tokens_like_padding() -> Errors | None:
    model, x = tiny_model("gla"), tokens(2, 9)
    x[0, :3] = SIZES["pad_token_id"]
    mask = torch.ones_like(x)
    cache = sharded(model, x, None, attention_mask=mask)
    if cache is None:
        return None
    same = generate(model, x, attention_mask=mask, past_key_values=cache) == generate(model, x, attention_mask=mask)
    return {"text": (~same).sum().item()}


def test_the_padding_token_may_be_a_token() -> None:
    """A mask of ones says that no token of the prompt is padding."""
    assert run_distributed(tokens_like_padding, 2) == [{"text": 0}, None]


def test_a_context_without_a_group_prefills_on_one_process() -> None:
    with patch.object(LlamaRMSNorm, "forward", exact_norm):
        for interval in (2, 0):
            model, x = tiny_model("retention", full_attention_interval=interval).double(), tokens(2, 12)
            enable_sequence_parallel(model, SequenceParallelContext(None))
            cache = prefill(model, x)
            enable_sequence_parallel(model, None)
            found = errors(model, x, cache)
            assert found is not None
            assert found.pop("text") == 0
            assert max(found.values()) < 1e-10
            assert isinstance(cache, RecurrentCache) == (interval == 0)
