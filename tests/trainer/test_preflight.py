"""Errors found before anything starts, and runs that may write to a folder with another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments
from linear_llama3.trainer.__main__ import main
from linear_llama3.trainer.checkpoints import manifest as checkpoints
from linear_llama3.trainer.recipes.preflight import check_before_launch, check_output_dir, check_trackers
from linear_llama3.trainer.recipes.recipe import load_recipe
from tests.helpers.ranks import run_distributed
from tests.helpers.recipes import MODEL, recipe_with, write_corpus, write_tokenizer
from tests.helpers.training import arguments, reset_accelerate, rows, tiny_model

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["sequence_parallel.size=3"], "must divide the number of processes, got 3 for 2"),
        (["data.files=DIR/none"], r"data\.files must name files, .* got '.*none'"),
        (["tokenizer=DIR/none"], "tokenizer must be a folder or a Hub name with a tokenizer"),
        (["model.vocab_size=20"], "each of the tokenizer's 28 tokens, got vocab_size = 20"),
        (["model={name_or_path: DIR/none}"], "^name_or_path must be a folder or a Hub name with weights[^\n]*$"),
        (["training.output_dir=/proc/nope"], "folder that can be written to, got /proc/nope: No such file"),
        (["training.output_dir=DIR/recipe.yaml"], "can be written to, got .*recipe.yaml: File exists"),
        (["training.report_to=wandb"], "must name installed trackers, got wandb: .*pip install wandb.*report_to: none"),
        (["training.report_to=wand"], r"training\.report_to must name trackers, got wand: wand is not supported, only"),
        (["data.text_column=body"], r"text_column must be one of \['text'\], .* got 'body'"),
        (["data.format=chat"], "format: chat needs a column messages, or prompt and completion"),
        (["validation.files=DIR/none"], r"validation: data\.files must name files, .* got '.*none'"),
        (
            ["training.resume_from_checkpoint=DIR/none"],
            "resume_from_checkpoint must be the folder of a .*no such folder",
        ),
        (
            ["training.resume_from_checkpoint=true"],
            "true needs a complete checkpoint in output_dir, got .*latest starts",
        ),
        (["data.format=chat", "data.chat_template=DIR/none"], "must be a file with a Jinja template, got"),
        (["data.format=chat", "data.chat_template=DIR/broken"], "must be a Jinja template, got .*broken', line 2: "),
        (
            ["sequence_parallel={size: adaptive, profile: DIR/none.json}", "data.packing=none"],
            r"a profile must be .*none\.json', which does not exist; measure one with `linear-llama3 profile`",
        ),
    ],
)
def test_mistakes_that_every_process_would_make(changes: list[str], message: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "broken").write_text("{# a template #}\n{% for m in messages %}")
    (tmp_path / "template").write_text(TEMPLATE)
    file = recipe_with(tmp_path)
    check_before_launch(load_recipe(file), 2)
    (tmp_path / "chats.jsonl").write_text('{"messages": []}')
    chat = ["data.format=chat", f"data.files={tmp_path}/chats.jsonl"]
    check_before_launch(load_recipe(file, [*chat, f"data.chat_template={tmp_path}/template"]), 2)
    with pytest.raises(ValueError, match=message):
        check_before_launch(load_recipe(file, [change.replace("DIR", str(tmp_path)) for change in changes]), 2)


def test_trackers_that_are_there() -> None:
    for names in (None, "none", ["none"], [], "all", ["all"]):
        check_trackers({} if names is None else {"report_to": names})


def write_run(folder: Path, *, model: bool = False, reached: dict[str, Any] | None = None, steps: tuple = ()) -> None:
    folder.mkdir()
    (folder / "README.md").touch()
    if model:
        (folder / "adapter_model.safetensors").touch()
    if reached is not None:
        (folder / checkpoints.STATE_NAME).write_text(json.dumps(reached))
    for step in steps:
        checkpoints.begin(folder / f"checkpoint-{step}")
        checkpoints.finish(folder / f"checkpoint-{step}", {})


DONE = {"global_step": 4, "epoch": 2.0}
LATEST = {"resume_from_checkpoint": "latest"}
FREE: Any = None


class Finished(str):
    """Message about a run that has finished."""


MODEL_THERE = "must not hold another run, .* with a model .adapter_model.safetensors.; choose another"


@pytest.mark.parametrize(
    ("held", "training", "expected"),
    [
        ({}, {}, FREE),
        ({}, LATEST, FREE),
        ({"model": True}, {}, MODEL_THERE),
        ({"model": True}, {"overwrite_output_dir": True}, FREE),
        ({"steps": (2,)}, {"overwrite_output_dir": True}, FREE),
        ({"steps": (2,)}, {"overwrite_output_dir": True, **LATEST}, "starts a new run and .* continues one, got both"),
        ({"steps": (2, 4)}, {}, "checkpoints up to step 4; .*resume_from_checkpoint: latest to continue"),
        ({"steps": (2,), "model": True}, {}, r"a model \(.*\) and checkpoints up to step 2; "),
        ({"steps": (2,)}, LATEST, FREE),
        ({"steps": (2,)}, {"resume_from_checkpoint": True}, FREE),
        ({"steps": (2,)}, {"resume_from_checkpoint": False}, "checkpoints up to step 2"),
        ({"steps": (2,)}, {"resume_from_checkpoint": "FOLDER/checkpoint-2"}, FREE),
        ({"steps": (2,)}, {"resume_from_checkpoint": "OTHER/checkpoint-2"}, "checkpoints up to step 2"),
        ({"steps": (2,), "model": True, "reached": DONE}, {**LATEST, "max_steps": 8}, FREE),
        ({"steps": (2,), "model": True, "reached": DONE}, {**LATEST, "max_steps": 4}, Finished("step 4 of 4")),
        ({"model": True, "reached": DONE}, {**LATEST, "max_steps": 4}, Finished("step 4 of 4")),
        ({"model": True, "reached": DONE}, {**LATEST, "num_train_epochs": 2}, Finished("epoch 2 of 2")),
        ({"model": True, "reached": DONE}, LATEST, "and no complete checkpoint to resume from; choose"),
        ({"model": True, "reached": DONE}, {**LATEST, "max_steps": 8}, "and no complete checkpoint to resume from"),
        ({"model": True, "reached": DONE}, {"max_steps": 4}, MODEL_THERE),
    ],
)
def test_folders_that_hold_another_run(
    held: dict[str, Any], training: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    write_run(folder, **held)
    resume = training.get("resume_from_checkpoint")
    if isinstance(resume, str):
        resume = resume.replace("FOLDER", str(folder)).replace("OTHER", str(tmp_path / "other"))
    given = {**training, "output_dir": str(folder), "resume_from_checkpoint": resume}
    if expected is FREE:
        assert check_output_dir(given) is None
    elif isinstance(expected, Finished):
        assert check_output_dir(given) == f"nothing is left to train: {folder} holds this run's model, {expected}"
    else:
        with pytest.raises(ValueError, match=expected):
            check_output_dir(given)


def test_a_run_without_output_dir_has_transformers_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in dict[str, Any](), dict[str, Any](output_dir=None):
        assert check_output_dir(given) is None
        assert LinearLlama3TrainingArguments(**given, use_cpu=True).output_dir == "trainer_output"
    assert [path.name for path in tmp_path.iterdir()] == ["trainer_output"]


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_runs_into_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """Start, refuse, finish, prolong, change the size of and replace a run: files change only when they should."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path / "corpus")
    write_tokenizer(tmp_path / "tokenizer")
    out = tmp_path / "out"
    file = recipe_with(tmp_path, sequence_length=9, model={**MODEL, "tie_word_embeddings": True})
    saving = ["training.save_strategy=steps", "training.save_steps=1"]
    latest = [*saving, "training.resume_from_checkpoint=latest"]

    def run(*changes: str) -> None:
        reset_accelerate()
        main(file, list(changes))

    run(*latest)
    before = content(out)
    assert {"model.safetensors", "checkpoint-2/model.safetensors", "trainer_state.json"} <= before.keys()
    with pytest.raises(
        SystemExit, match=r"error: output_dir must not hold another run, .* and checkpoints up to step 2"
    ):
        run(*saving)
    capsys.readouterr()
    run(*latest)
    assert f"nothing is left to train: {out} holds this run's model, step 2 of 2\n" == capsys.readouterr().out
    assert content(out) == before, "a finished run was written to"

    for changes, text in (
        (["hidden_size=32"], r"model\.embed_tokens\.weight \(28, 16\) where the run has \(28, 32\)"),
        (["num_hidden_layers=4"], r"no model\.layers\.2\.\S+ and \d+ others; resume with the model"),
        (["num_hidden_layers=1", "full_attention_interval=0"], r"model\.layers\.1\.\S+ \(.*\) where the run has none"),
    ):
        with pytest.raises(SystemExit, match=rf"error: a checkpoint must be of the same model, .*{text}") as refused:
            run(*latest, "training.max_steps=3", *[f"model.{change}" for change in changes])
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 600

    caplog.clear()
    run(*latest, "training.max_steps=3")
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 3
    assert "missing keys" not in caplog.text, "a tied weight is saved once"
    assert content(out)["model.safetensors"] != before["model.safetensors"]

    run("training.overwrite_output_dir=true", 'training.save_strategy="no"')
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2
    assert checkpoints.steps(out) == [], "a resume would take them"


def test_data_that_a_stream_reaches_late(tmp_path: Path) -> None:
    """The error is a message without a traceback, like every mistake in data."""
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text('{"text": "abcdefgh"}\n' * 100 + "{")  # behind the first documents tokenized
    file = recipe_with(tmp_path, sequence_length=9)
    reset_accelerate()
    with pytest.raises(SystemExit, match=r"^error: .*a\.jsonl, line 101 is not JSON: [^\n]*; correct or remove it$"):
        main(file, [f"data.files={tmp_path}/a.jsonl", "data.streaming=true", "training.max_steps=999"])


@pytest.mark.parametrize("text", ["{a: [1", "data: {files: a, : b"])
def test_yaml_that_cannot_be_read_is_said_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^a recipe must be YAML, .*recipe.yaml is not: [^\n]*line \d[^\n]*$"):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("model: {}")
    with pytest.raises(ValueError, match=r"^a change's value must be YAML, [^\n]*; quote it as one word$"):
        load_recipe(tmp_path / "recipe.yaml", ["model={a:"])


def impossible_folder() -> str:
    reset_accelerate()
    try:
        args = LinearLlama3TrainingArguments(**arguments("/proc/nope", 1))
        LinearLlama3Trainer(model=tiny_model(), args=args, train_dataset=rows(False))
    except ValueError as error:
        return str(error)
    finally:
        reset_accelerate()
    return "accepted"


def test_a_trainer_refuses_an_impossible_folder_on_all_ranks() -> None:
    """transformers would fail on rank 0 only, and the others would wait for it."""
    for said in run_distributed(impossible_folder, 2):
        assert "output_dir must be a folder that can be written to, got /proc/nope" in said
