"""Recipes: the values that are read and refused, and a complete run through accelerate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from huggingface_hub import ModelCard
from torch.distributed.fsdp import StateDictType
from transformers import AutoModelForCausalLM

from linear_llama3.sequence_parallel import SequenceParallelConfig
from linear_llama3.trainer.__main__ import build_trainer, save
from linear_llama3.trainer.recipes.build import build_model
from linear_llama3.trainer.recipes.recipe import load_recipe
from tests.helpers.recipes import MODEL, ROOT, launch, recipe_with, write_corpus, write_tokenizer


def test_a_recipe_is_read(tmp_path: Path) -> None:
    path = recipe_with(tmp_path, sequence_parallel={"size": 2})
    path.write_text(path.read_text() + "\n# 1e-3 is a number\n")
    path.write_text(path.read_text().replace("max_steps: 2", "max_steps: 2\n  learning_rate: 1e-3"))
    recipe = load_recipe(path)
    assert recipe.sequence_parallel.size == 2 and recipe.sequence_parallel.linear == "lasp2"
    assert recipe.training["learning_rate"] == 1e-3
    assert recipe.training_arguments().max_steps == 2


TRUE, FALSE = ("yes", "on", "True", "true"), ("no", "off", "Off", "false")


@pytest.mark.parametrize(("words", "value"), [(TRUE, True), (FALSE, False)], ids=["true", "false"])
def test_words_of_yaml(words: tuple[str, ...], value: bool, tmp_path: Path) -> None:
    """`no` is text in a text field, and a boolean in a boolean or untyped field."""
    path = recipe_with(tmp_path)
    for word in words:
        recipe = load_recipe(
            path,
            [
                f"data.streaming={word}",
                f"model.linear_output_gate={word}",
                f"training.gradient_checkpointing={word}",
                f"training.gradient_checkpointing_kwargs={{use_reentrant: {word}}}",
                f"training.include_num_input_tokens_seen={word}",
                f"lora={{use_rslora: {word}, init_lora_weights: {word}}}",
                f"tokenizer={word if word.islower() and len(word) < 4 else 'x'}",
            ],
        )
        lora, arguments = recipe.lora_config(), recipe.training_arguments()
        assert recipe.data.streaming is recipe.model_config().linear_output_gate is value
        assert arguments.gradient_checkpointing is value
        assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": value}
        assert arguments.include_num_input_tokens_seen in (value, "all" if value else "no")
        assert lora.use_rslora is lora.init_lora_weights is value
        assert recipe.tokenizer in (word, "x")
    with pytest.raises(ValueError, match="streaming in data must be true or false, got 'nein'"):
        load_recipe(path, ["data.streaming=nein"])


def test_values_that_yaml_reads_otherwise(tmp_path: Path) -> None:
    path = recipe_with(tmp_path)
    text = path.read_text().replace("logging_steps: 1", "logging_steps: 1\n  save_strategy: no\n  logging_strategy: no")
    path.write_text(
        f"\ufeff{text}  run_name: 2020-01-01\n  weight_decay: .5e-1\n  max_grad_norm: 1E0\n  save_steps: 1e3\n"
    )
    training = load_recipe(path, ["training.save_total_limit=2.0", "training.hub_strategy=end"]).training
    assert (training["save_strategy"], training["logging_strategy"], training["hub_strategy"]) == ("no", "no", "end")
    assert (training["run_name"], training["weight_decay"], training["max_grad_norm"]) == ("2020-01-01", 0.05, 1.0)
    for number in (10, 0.5, None):  # of type float | None
        assert (
            load_recipe(path, [f"training.neftune_noise_alpha={number or 'null'}"]).training["neftune_noise_alpha"]
            == number
        )
    assert training["save_total_limit"] == 2 and isinstance(training["save_total_limit"], int)
    assert load_recipe(path).training_arguments().save_strategy == "no"


def test_a_launch_changes_a_recipe(tmp_path: Path) -> None:
    path = recipe_with(tmp_path)
    recipe = load_recipe(path, ["sequence_parallel.softmax=ring", "training.learning_rate=1e-3", "sequence_length=64"])
    assert recipe.sequence_parallel.config() == SequenceParallelConfig(softmax="ring")
    assert (recipe.training["learning_rate"], recipe.sequence_length) == (1e-3, 64)
    with pytest.raises(ValueError, match=r"must read section\.key=value .* got 'sequence_length'"):
        load_recipe(path, ["sequence_length"])
    with pytest.raises(ValueError, match=r"name a section of the recipe, got 'tokenizer\.name=x'"):
        load_recipe(path, ["tokenizer.name=x"])
    with pytest.raises(ValueError, match="unknown key 'sofmax' in sequence_parallel; did you mean 'softmax'"):
        load_recipe(path, ["sequence_parallel.sofmax=ring"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**MODEL, "hidden_size": "big"}}, "hidden_size in model must be an integer, got 'big'$"),
        ({"model": {**MODEL, "linear_attention_type": "mail"}}, "linear_attention_type must be one of .*got 'mail'"),
        ({"training": {"max_steps": "ten"}}, "max_steps in training must be an integer, got 'ten'$"),
        (
            {"training": {"save_strategy": False}},
            "save_strategy in training must be one of no, steps, epoch, best, got False$",
        ),
        ({"training": {"save_strategy": "step"}}, "save_strategy in training must be one of no, .*, got 'step'$"),
        (
            {"training": {"learning_rate": "0.5"}},
            "learning_rate in training must be a number, got '0.5'; write it without quotes",
        ),
        ({"training": {"max_steps": 0.5}}, r"max_steps in training must be an integer, got 0\.5$"),
        (
            {"training": {"neftune_noise_alpha": True}},
            "neftune_noise_alpha in .* must be .*a number.*, got True$",
        ),
        ({"training": {"bf16": 1}}, "bf16 in training must be true or false, got 1$"),
        ({"training": {"report_to": 3}}, r"must be null or text or a list \(of text\), got 3; write it in quotes"),
        (
            {"data": {"files": ["a", 2020]}},
            r"files in data must be text or a list \(of text\) or null, got \['a', 2020\]",
        ),
        ({"tokenizer": ["a"]}, r"tokenizer in recipe .* must be text, got \['a'\]$"),
        (
            {"training": {"per_device_train_batch_size": 0}},
            "training.per_device_train_batch_size must be at least 1, got 0; correct it or leave it out",
        ),
        ({"training": {"gradient_accumulation_steps": 0}}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"training": {"sequence_parallel_size": 2}}, "unknown key 'sequence_parallel_size' in training"),
        ({"modle": {}}, "unknown key 'modle' in recipe .*did you mean 'model'"),
        ({"model": {**MODEL, "hiden_size": 3}}, "unknown key 'hiden_size' in model; did you mean 'hidden_size'"),
        ({"training": {"lerning_rate": 1}}, "unknown key 'lerning_rate' in training; did you mean 'learning_rate'"),
        ({"training": {"lr_scheduler_type": "cosin"}}, "lr_scheduler_type in training must be one of .*got 'cosin'"),
        ({"training": {"deepspeed": "ds.json"}}, "DeepSpeed is not supported"),
        ({"data": {"file": "x"}}, "unknown key 'file' in data; did you mean 'files'"),
        ({"data": {}}, "data needs files or dataset, one of them"),
        ({"data": {"files": "a", "dataset": "b"}}, "one of them"),
        ({"data": ["a"]}, "data in recipe .* must be a mapping, got"),
        ({"data": None}, "needs data"),
        (
            {"data": {"files": "a", "packing": "tight"}},
            "packing in data must be one of wrapped, best_fit, none, got",
        ),
        ({"data": {"files": "a", "long_documents": "drop"}}, "long_documents in data must be one of continue, cut"),
        ({"data": {"files": "a", "format": "chats"}}, "format in data must be one of text, chat, got 'chats'"),
        ({"data": {"files": "a", "chat_template": "x"}}, "data.chat_template needs format: chat, got format: text"),
        (
            {"data": {"files": "a", "streaming": True}, "training": {}},
            "data.streaming needs training.max_steps",
        ),
        ({"processes": 0}, "processes must be 'auto' or a positive integer, got 0"),
        ({"processes": "all"}, "processes must be 'auto' or a positive integer, got 'all'"),
        ({"lora": {"rank": 4}}, "unknown key 'rank' in lora"),
        ({"lora": {"task_type": "X"}}, "task_type in lora must be one of .*CAUSAL_LM, .*, got 'X'"),
        ({"lora": {"r": "x"}}, "r in lora must be an integer, got 'x'"),
        ({"lora": {"target_modules": "all", "layers_pattern": "h"}}, "lora in the recipe does not make a LoraConfig"),
        (
            {"model": {"name_or_path": "x", "dtype": "int8"}},
            "dtype in model with name_or_path must be one of float32, bfloat16, float16",
        ),
        ({"sequence_length": "8k"}, "sequence_length in recipe .* must be an integer, got '8k'"),
        ({"sequence_length": 1}, "sequence_length must be at least 2"),
        ({"sequence_parallel": {"linear": "mail"}}, "got 'mail'"),
        ({"sequence_parallel": {"size": 1.5}}, "size in sequence_parallel must be"),
        (
            {"sequence_parallel": {"size": "adaptive"}},
            "profile goes with size: adaptive, .* got size: adaptive and .*None",
        ),
        ({"sequence_parallel": {"profile": "p.json"}}, "profile goes with size: adaptive, .* got size: auto"),
        (
            {"sequence_parallel": {"size": "adaptive", "profile": "p.json"}},
            "lengths of stored documents, got data with streaming: False and packing: wrapped; set packing: none",
        ),
        ({"model": {"name_or_path": "x", "hidden_size": 3}}, "unknown key 'hidden_size' in model with name_or_path"),
        (
            {"model": {"name_or_path": "x", "preset": "linear-llama-3.2-1b"}},
            "unknown key 'preset' in model with name_or_path",
        ),
        (
            {"model": {"preset": "linear-llama-3.2-2b"}},
            r"got 'linear-llama-3\.2-2b'; the shapes are .*linear-llama-3\.2-1b",
        ),
        (
            {"model": {"preset": "linear-llama-3.2-1b", "num_hidden_layers": 6}},
            "1/4 of 'linear-llama-3.2-1b' .* got 6 layers",
        ),
    ],
)
def test_recipes_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_with(tmp_path, **changes))


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a YAML file, got .*does not exist"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="must be YAML"):
        load_recipe(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match=r"a change's value must be YAML, 'training.max_steps=\[1' is not"):
        load_recipe(recipe_with(tmp_path), ["training.max_steps=[1"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name_or_path": "no/such/folder"}, "name_or_path must be a folder or a Hub name with weights, got 'no/such"),
        ({**MODEL, "vocab_size": 20}, "each of the tokenizer's 28 tokens, got vocab_size = 20"),
    ],
)
def test_models_that_are_refused(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_with(tmp_path, model=model))
    with pytest.raises(ValueError, match=message):
        build_model(recipe, write_tokenizer(tmp_path / "tokenizer"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], torch.float32),
        (["lora={r: 2}"], torch.bfloat16),
        (["model.dtype=bfloat16"], torch.bfloat16),
        (["lora={r: 2}", "model.dtype=float16"], torch.float16),
    ],
    ids=str,
)
def test_the_precision_of_loaded_weights(changes: list[str], expected: torch.dtype, tmp_path: Path) -> None:
    """Trained weights are float32, since steps are below the resolution of bfloat16; frozen ones stay as they are."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    build_model(load_recipe(recipe_with(tmp_path)), tokenizer).bfloat16().save_pretrained(str(tmp_path / "model"))
    recipe = load_recipe(recipe_with(tmp_path, model={"name_or_path": str(tmp_path / "model")}), changes)
    for weights in (True, False):
        parameters = build_model(recipe, tokenizer, weights=weights).named_parameters()
        assert {p.dtype for name, p in parameters if "lora_" not in name} == {expected}


def test_a_preset_in_a_recipe(tmp_path: Path) -> None:
    """The recipe's fields go before the tokenizer's, and these before the preset's."""
    small = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 16}
    model = {"preset": "linear-llama3-1b-retention-hybrid-1-2", **small}
    recipe = load_recipe(recipe_with(tmp_path, model=model), ["sequence_length=32768"])
    config = build_model(recipe, write_tokenizer(tmp_path / "tokenizer")).config
    assert (config.vocab_size, config.eos_token_id, config.bos_token_id) == (28, 0, None)
    assert (config.hidden_size, config.num_attention_heads, config.linear_num_key_value_heads) == (32, 16, 16)
    assert config.linear_layers == [0, 2] and config.linear_attention_type == "retention"
    assert config.max_position_embeddings == 32768
    changed = load_recipe(tmp_path / "recipe.yaml", ["model.vocab_size=99", "model.preset=linear-llama-3.2-1b"])
    config = changed.model_config(vocab_size=28)
    assert (config.vocab_size, config.linear_layers, config.max_position_embeddings) == (99, [0, 1, 2], 131072)


def test_complete_weights_are_saved_under_fsdp2() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    saved = []
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
        save_model=lambda: saved.append(plugin.state_dict_type),
        save_state=lambda: None,
    )
    save(trainer)
    assert saved == [StateDictType.FULL_STATE_DICT]


@pytest.mark.slow
def test_a_run_through_accelerate(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    write_tokenizer(tmp_path / "tokenizer")
    done = launch(recipe_with(tmp_path, sequence_length=9), 2, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 data-parallel x 2 sequence-parallel processes, 6 tokens of every row each" in done.stdout
    assert "ranks 0 to 1" in done.stdout and "peak_memory_gib" in done.stdout
    out = tmp_path / "out"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and "linear_llama3" in card.data.tags
    assert "| tokens | 18 |" in card.text and "1 data-parallel x 2 sequence-parallel" in card.text
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LinearLlama3ForCausalLM" and model.config.vocab_size == 28
    assert (out / "tokenizer.json").is_file() and (out / "linear_llama3_hub.py").is_file()


def test_a_run_warns_of_a_template_that_never_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning, with the name of the template; none for the recipes' own, or if another token ends generation."""
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    own, endless = ROOT / "scripts/recipes/chat.jinja", tmp_path / "endless.jinja"
    endless.write_text(
        own.read_text().replace(" + eos_token", "").replace('{{- "\\n" -}}', '{{- eos_token + "\\n" -}}')
    )
    for template in (own, endless):
        data = {"files": str(tmp_path / "a.jsonl"), "format": "chat", "packing": "none", "chat_template": str(template)}
        recipe = load_recipe(recipe_with(tmp_path, data=data, sequence_length=64))
        build_trainer(recipe, recipe.training_arguments())
    warnings = [record.getMessage() for record in caplog.records if "learn to stop" in record.getMessage()]
    assert len(warnings) == 1 and str(endless) in warnings[0] and "Put _ before {% endgeneration %}" in warnings[0]
