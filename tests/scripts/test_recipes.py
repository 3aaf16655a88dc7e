"""Small versions of all recipes in scripts/recipes run for two steps on two processes, on the quickstart's data.

By default recipes are only read; tests/trainer trains from a recipe.
"""

from __future__ import annotations

import json
import os
import runpy
import sysconfig
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.trainer.__main__ import build_trainer, main
from linear_llama3.trainer.adaptive.profiling import measure_profile
from linear_llama3.trainer.recipes.recipe import load_recipe
from tests.helpers.ranks import run_distributed
from tests.helpers.training import reset_accelerate
from tests.test_cli import command

ROOT = Path(__file__).parents[2]
SMALL = ["sequence_length=256", "training.max_steps=2", "training.disable_tqdm=true"]
SMALL_MODEL = ["model.hidden_size=32", "model.intermediate_size=48"]


def arguments(name: str, *changes: str) -> list[str]:
    return [f"scripts/recipes/{name}.yaml", *SMALL, *changes]


def train(folder: str, name: str, *changes: str) -> None:
    """Run the equivalent of `python -m linear_llama3.trainer` in `folder`."""
    reset_accelerate()
    before, datasets.config.HF_DATASETS_CACHE = os.getcwd(), Path(folder) / "cache"
    os.chdir(folder)
    try:
        recipe, *values = arguments(name, *changes)
        main(Path(recipe), values)
    finally:
        os.chdir(before)
        reset_accelerate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the quickstart's results: data, a tokenizer, a model."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    data = runpy.run_path(str(ROOT / "scripts/quickstart_data.py"))
    (corpus := folder / "runs/quickstart/corpus").mkdir(parents=True)
    for name in ("textwrap", "bisect", "shutil"):
        text = (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text()
        (corpus / f"{name}.py.txt").write_text(text)
    files = sorted(corpus.iterdir())
    data["train_tokenizer"](files, folder / "runs/quickstart/tokenizer")
    assert data["write_chats"](files, folder / "runs/quickstart/chats.jsonl") > 4
    run_distributed(train, 2, str(folder), "quickstart", *SMALL_MODEL)
    return folder


def difference(folder: Path, trained: Any) -> float:
    """Return the largest relative change of a weight since the quickstart."""
    start = LinearLlama3ForCausalLM.from_pretrained(folder / "runs/quickstart/model").state_dict()
    now = trained.state_dict()
    return max(float((now[name] - x).norm() / x.norm()) for name, x in start.items())


@pytest.mark.slow
def test_quickstart_saves_a_hybrid_model_and_a_plot(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "runs/quickstart/model")
    assert model.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert (folder / "runs/quickstart/model/loss.png").is_file()


@pytest.mark.slow
def test_long_context_starts_from_the_quickstart_with_a_larger_rotary_base(folder: Path) -> None:
    run_distributed(train, 2, str(folder), "long_context", "sequence_length=512")
    model = AutoModelForCausalLM.from_pretrained(folder / "runs/quickstart/long_context")
    assert model.config.rope_parameters["rope_theta"] == 2e6 and model.config.max_position_embeddings == 512
    assert 0 < difference(folder, model) < 0.5, "it starts from these weights"


@pytest.mark.slow
def test_sft_saves_weights_and_chat_template(folder: Path) -> None:
    run_distributed(train, 2, str(folder), "sft")
    assert 0 < difference(folder, AutoModelForCausalLM.from_pretrained(folder / "runs/quickstart/sft")) < 0.5
    tokenizer = AutoTokenizer.from_pretrained(folder / "runs/quickstart/sft")
    assert "generation" in tokenizer.chat_template, "the template is saved with the tokenizer"


def training_targets(folder: str) -> list[str]:
    """Return the targets of the conversations' rows as text, one string per unbroken stretch."""
    os.chdir(folder)
    reset_accelerate()
    datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
    recipe = load_recipe("scripts/recipes/sft.yaml", [*SMALL, "training.output_dir=runs/learnt"])
    trainer = build_trainer(recipe, recipe.training_arguments())
    tokenizer, found = trainer.processing_class, []
    for row in trainer.train_dataset:
        stretch: list[int] = []
        for label in [*row["labels"], -100]:
            if label != -100:
                stretch.append(label)
            elif stretch:
                found.append(tokenizer.decode(stretch))
                stretch = []
    reset_accelerate()
    return found


@pytest.mark.slow
def test_sft_trains_on_answers_and_end_tokens_only(folder: Path) -> None:
    """Targets are answers, each closed by the end token; those that exceed the row are cut."""
    (found,) = run_distributed(training_targets, 1, str(folder))
    lines = (folder / "runs/quickstart/chats.jsonl").read_text().splitlines()
    answers = [m["content"] for line in lines for m in json.loads(line)["messages"][1::2]]
    assert len(found) > 5
    for text in found:
        assert any(answer + "<|end|>" == text or answer.startswith(text) for answer in answers), text
    assert sum(text.endswith("<|end|>") for text in found) > 5


@pytest.mark.slow
def test_lora_by_the_command_saves_adapters_only(folder: Path) -> None:
    """Run `linear-llama3 train`, which starts both processes through accelerate."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        done = command("train", *arguments("lora"), HF_DATASETS_CACHE=str(folder / "cache"))
    finally:
        os.chdir(before)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 data-parallel x 2 sequence-parallel processes, 128 tokens of every row each" in done.stdout
    trained = folder / "runs/quickstart/lora"
    assert not (trained / "model.safetensors").exists()
    adapters = load_file(trained / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapters) and any(
        "lora_B" in name and x.any() for name, x in adapters.items()
    )
    os.chdir(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(trained)  # the weights that it names, and the adapters
        assert isinstance(model, LinearLlama3ForCausalLM) and any(
            "lora_B" in name for name, _ in model.named_parameters()
        )
        base = LinearLlama3ForCausalLM.from_pretrained("runs/quickstart/model")
        merged = PeftModel.from_pretrained(base, trained).merge_and_unload()
        ids = torch.arange(40)[None]
        assert torch.allclose(model(ids).logits, merged(ids).logits, atol=1e-5)
    finally:
        os.chdir(before)
    card = (trained / "README.md").read_text()
    assert "LoRA adapters" in card


@pytest.mark.slow
def test_pretrain_runs_on_a_stream_of_local_files(folder: Path) -> None:
    """Use a small model, and a stream of local files in place of the Hub's."""
    run_distributed(
        train,
        2,
        str(folder),
        "pretrain",
        *SMALL_MODEL,
        "model.num_hidden_layers=4",
        "tokenizer=runs/quickstart/tokenizer",
        "data.dataset=null",
        "data.arguments={}",
        "data.files=runs/quickstart/corpus/*.txt",
        "training.use_cpu=true",
        "training.save_steps=1",
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "runs/pretrain")
    assert model.config.linear_attention_type == "gla" and model.config.layer_types.count("full_attention") == 1
    assert (folder / "runs/pretrain/checkpoint-2").is_dir()


def profile(folder: str, *changes: str) -> None:
    """Run the equivalent of `python -m linear_llama3.trainer.adaptive.profiling` in `folder`."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        measured = measure_profile(load_recipe("scripts/recipes/adaptive.yaml", changes), name="profile")
        if dist.get_rank() == 0:
            measured.save("runs/quickstart/profile.json")
        dist.barrier()
    finally:
        os.chdir(before)


@pytest.mark.slow
def test_adaptive_runs_on_a_measured_profile(folder: Path) -> None:
    changes = ["sequence_length=256", *SMALL_MODEL]
    run_distributed(profile, 2, str(folder), *changes)
    run_distributed(train, 2, str(folder), "adaptive", *SMALL_MODEL, "training.logging_steps=1")
    state = json.loads((folder / "runs/quickstart/adaptive/trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(logs) == 2 and all(entry["groups_of_1"] + entry["groups_of_2"] > 0 for entry in logs)
    card = (folder / "runs/quickstart/adaptive/README.md").read_text()
    assert "adaptive groups of 1, 2 of 2 processes" in card


def test_every_recipe_has_a_test() -> None:
    names = {path.stem for path in (ROOT / "scripts/recipes").glob("*.yaml")}
    assert names == {"quickstart", "long_context", "sft", "lora", "pretrain", "adaptive"}


@pytest.mark.parametrize("path", sorted((ROOT / "scripts/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path, SMALL)
    assert recipe.sequence_length == 256 and recipe.training["max_steps"] == 2
