"""The dry run's numbers against those of the model that is really built, sharded and trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from linear_llama3.modeling.flops import batch_flops
from linear_llama3.sequence_parallel import SequenceParallelContext, enable_sequence_parallel
from linear_llama3.trainer.memory.account import MemoryAccount
from linear_llama3.trainer.recipes import dry_run as module
from linear_llama3.trainer.recipes.build import build_model, load_tokenizer
from linear_llama3.trainer.recipes.dry_run import dry_run
from linear_llama3.trainer.recipes.recipe import load_recipe
from scripts.traffic import Traffic
from tests.helpers.ranks import run_distributed
from tests.helpers.recipes import MODEL, recipe_with, write_tokenizer

LENGTH = 32


def described(recipe: Path, *changes: str, processes: int = 1) -> str:
    return dry_run(load_recipe(recipe, changes), processes, gpu=False)


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"no {pattern!r} in {text}"
    return float(found.group(1).replace(",", ""))


def recipe_of(folder: Path, **changes: Any) -> Path:
    write_tokenizer(folder / "tokenizer")
    return recipe_with(folder, **{"sequence_length": LENGTH, **changes})


@pytest.mark.parametrize("lora", [None, {"r": 3}], ids=["all", "lora"])
def test_parameters_and_flops(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    path = recipe_of(tmp_path, lora=lora)
    recipe = load_recipe(path)
    model = build_model(recipe, load_tokenizer(recipe))
    text = described(
        path, "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=5", processes=3
    )
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert number(r"model +([\d,]+) parameters", text) == total
    if lora is not None:
        assert number(r"([\d,]+) of them trained", text) == trained < total
    assert "layers 1 x LN (L lightning, N softmax)" in text
    batch = {"input_ids": torch.zeros(2 * 5, LENGTH, dtype=torch.long)}
    flops = batch_flops(model, batch).training  # of one group of three processes
    assert number(r"FLOPs +([\d.e+]+) a step", text) == pytest.approx(flops, rel=1e-3)
    assert number(r"a step, ([\d.e+]+) on each", text) == pytest.approx(flops / 3, rel=1e-3)


def test_a_loaded_model(tmp_path: Path) -> None:
    """Its own shape, without its weights."""
    path = recipe_of(tmp_path)
    recipe = load_recipe(path)
    model = build_model(recipe, load_tokenizer(recipe))
    model.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "model/model.safetensors").unlink()
    text = described(recipe_of(tmp_path, model={"name_or_path": str(tmp_path / "model")}))
    assert number(r"model +([\d,]+) parameters", text) == model.num_parameters()


def test_the_grid(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, sequence_parallel={"size": 3}, sequence_length=100)
    changes = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4"]
    text = described(path, *changes, processes=6)
    assert "step        1,600 tokens: 2 replicas x 4 accumulated batches x 2 rows x 100" in text
    assert "CPU: 2 data-parallel x 3 sequence-parallel processes, 34 tokens of every row each" in text
    alone = described(path, "sequence_parallel.size=1", *changes, processes=2)
    assert "2 data-parallel x 1 sequence-parallel processes, 100 tokens of every row each" in alone
    assert "strategies  none: every sequence stays on one process" in alone
    with pytest.raises(ValueError, match="got 3 for 4"):
        described(path, processes=4)


def sent(recipe: str, changes: list[str]) -> tuple[float, int]:
    """MiB that this rank hands to torch.distributed in a forward and backward pass of a row, and its tokens."""
    loaded = load_recipe(recipe, changes)
    model = build_model(loaded, load_tokenizer(loaded)).train()
    if loaded.training.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable()
    context = SequenceParallelContext(dist.group.WORLD, loaded.sequence_parallel.config())
    enable_sequence_parallel(model, context)
    length = loaded.sequence_length
    ids = torch.arange(length)[None] % 20
    positions = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)])[None]
    packed = {} if loaded.data.packing == "none" else {"position_ids": positions}
    local = context.shard_batch({"input_ids": ids, "labels": ids, **packed})
    with Traffic() as traffic:
        model(**local, num_items_in_batch=length).loss.backward()
    return traffic.bytes / 2**20, local["input_ids"].shape[1]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(["sequence_parallel.linear=lasp2", "sequence_parallel.softmax=lasp2h"], marks=pytest.mark.slow),
        pytest.param(
            ["sequence_parallel.linear=lasp1", "sequence_parallel.softmax=rsa", "sequence_parallel.layout=contiguous"],
            marks=pytest.mark.slow,
        ),
        ["sequence_parallel.linear=all_to_all", "sequence_parallel.softmax=ulysses", "model.linear_attention_type=gla"],
        ["sequence_parallel.linear=lasp2", "sequence_parallel.softmax=lasp2h", "training.gradient_checkpointing=true"],
        ["sequence_parallel.linear=auto", "sequence_parallel.softmax=rsa", "training.gradient_checkpointing=true"],
        pytest.param(["model.full_attention_interval=0"], marks=pytest.mark.slow),
        ["data.packing=none", "model.linear_attention_type=basic"],
        pytest.param(["data.packing=none", "model.linear_attention_type=retention"], marks=pytest.mark.slow),
    ],
    ids=lambda changes: " ".join(change.split(".")[1] for change in changes),
)
def test_bytes_that_a_rank_sends(changes: list[str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}  # every part more than 0.001 MiB
    path = recipe_of(tmp_path, model={**MODEL, **sizes}, sequence_length=512)
    text = described(path, *changes, processes=2)
    kinds = re.findall(r"a rank sends ([\d.]+) MiB in (\d+) layers", text)
    assert [int(layers) for _, layers in kinds] == ([2] if "model.full_attention_interval=0" in changes else [1, 1])
    counted = run_distributed(sent, 2, str(path), changes)
    mean = sum(mib for mib, _ in counted) / 2
    assert sum(float(mib) for mib, _ in kinds) == pytest.approx(mean, abs=0.00051 * len(kinds)), text
    assert number(r"processes, ([\d,]+) tokens", text) == counted[0][1]


@pytest.mark.parametrize("setting", ["training.bf16=true", "training.fp16=true"])
def test_mixed_precision_halves_the_keys_and_values_but_not_their_gradients(setting: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = recipe_of(tmp_path, model={**MODEL, **sizes}, sequence_length=512, sequence_parallel={"softmax": "ring"})
    full, half = (
        number(r"softmax +ring: a rank sends ([\d.]+) MiB", described(path, *changes, processes=2))
        for changes in ([], [setting])
    )
    assert half == pytest.approx(full * 2 / 3, abs=0.001)  # k, v twice in 2 bytes, their sums of gradients in 4


def test_a_strategy_that_cannot_be_used(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, sequence_parallel={"softmax": "ulysses"})
    with pytest.raises(ValueError, match="ulysses cannot divide the heads of the softmax layers among 4 ranks; use"):
        described(path, processes=4)


PLAIN = {
    "tokens": LENGTH, "rows": 1, "documents": 2, "ranks": 2, "replicas": 1, "fsdp": False, "autocast": None,
    "optimizer": "adamw", "checkpointing": False, "offload": False, "tiling": False, "chunked_loss": True, "gpu": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], {}),
        (["data.packing=none", "training.per_device_train_batch_size=3"], {"documents": 1, "rows": 3}),
        (["sequence_parallel.size=1"], {"ranks": 1, "replicas": 2}),
        (
            ["training.gradient_checkpointing=true", "training.sequence_tiling=true"],
            {"checkpointing": True, "tiling": True},
        ),
        (["training.bf16=true", "training.optim=sgd"], {"autocast": torch.bfloat16, "optimizer": "sgd"}),
        (["training.fp16=true", "training.optim=adamw_8bit"], {"autocast": torch.float16, "optimizer": "adamw_8bit"}),
        (["training.chunked_loss=false"], {"chunked_loss": False}),
    ],
    ids=str,
)
def test_memory(changes: list[str], expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's settings reach the account, and its table is printed."""
    asked: list[dict[str, Any]] = []

    def account(model: Any, **arguments: Any) -> Any:
        asked.append(arguments)
        return MemoryAccount(lines={"weights": 3 * 2**30}, exchanged=0, host=0)

    monkeypatch.setattr(module, "memory_account", account)
    path = recipe_of(tmp_path)
    text = described(path, *changes, processes=2)
    (arguments,) = asked
    assert arguments.pop("strategies") == load_recipe(path).sequence_parallel.config()
    assert arguments == PLAIN | expected
    assert re.search(r"  weights +3\.00 GiB", text) and re.search(r"  total +3\.00 GiB", text)


def test_adapters_of_the_head_alone(tmp_path: Path) -> None:
    """Then no hidden state has a gradient."""
    path = recipe_of(tmp_path, lora={"r": 2, "target_modules": ["lm_head"]})
    assert re.search(r"  total +[\d.]+ GiB", described(path))


def test_a_machine_without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    text = dry_run(load_recipe(recipe_of(tmp_path)), 2, gpu=True)
    assert "computed, without the GPU's kernels, as triton is not installed;" in text


def test_an_optimizer_without_an_account(tmp_path: Path) -> None:
    assert "computed, adafactor counted as adamw;" in described(recipe_of(tmp_path), "training.optim=adafactor")
