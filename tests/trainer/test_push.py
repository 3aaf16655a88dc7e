"""Uploads of a Trainer: what stands in the repository during a run and after it."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import transformers.trainer
from huggingface_hub import ModelCard
from transformers import TrainingArguments, default_data_collator

from linear_llama3.trainer import LinearLlama3Trainer
from linear_llama3.trainer.recipes.recipe import load_recipe
from linear_llama3.trainer.recipes.report import write_model_card
from tests.helpers.recipes import recipe_with, write_tokenizer
from tests.helpers.tiny import tiny_model, tokens

FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "linear_llama3_hub.py",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training_args.bin",
}  # fmt: skip


class FakeHub:
    """Remembers what each upload of a folder held."""

    repo_id = "someone/my-model"

    def __init__(self) -> None:
        self.uploads: list[dict[str, bytes]] = []

    def create_repo(self, repo_id: str, **kwargs: Any) -> FakeHub:
        return self

    def upload_folder(self, *, folder_path: str, run_as_future: bool = False, **kwargs: Any) -> Any:
        self.uploads.append({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})
        done: Future[None] = Future()
        done.set_result(None)
        return done


def trainer(folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> LinearLlama3Trainer:
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    tokenizer = write_tokenizer(folder / "tokenizer")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=2, save_steps=1, report_to="none", use_cpu=True, push_to_hub=True,
        per_device_train_batch_size=1, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens(2, 8)]
    return LinearLlama3Trainer(
        model=tiny_model(),
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )


def test_every_upload_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those during the run, for which Trainer itself copies neither the shim nor a card."""
    hub = FakeHub()
    ours = trainer(tmp_path, hub, monkeypatch)
    ours.train()
    ours.save_model()
    assert len(hub.uploads) >= 3
    for files in hub.uploads:
        assert files.keys() >= FILES
        card = ModelCard(files["README.md"].decode())
        assert card.data.get("tags")[0] == "linear_llama3" and 'from_pretrained("someone/my-model")' in card.text


def test_a_users_card_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    ours = trainer(tmp_path, hub, monkeypatch)
    (tmp_path / "out" / "README.md").write_text("# Written by hand")
    ours.train()
    ours.save_model()
    assert {files["README.md"] for files in hub.uploads} == {b"# Written by hand"}


def test_facts_of_the_user_make_trainers_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trainer(tmp_path, FakeHub(), monkeypatch)
    ours.create_model_card(license="mit")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit" and "generated_from_trainer" in card.data.tags


def test_a_run_replaces_its_own_cards_only(tmp_path: Path) -> None:
    model, recipe = tiny_model(), load_recipe(recipe_with(tmp_path))
    readme = tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    for run in ("first", "second"):
        write_model_card(tmp_path, model, recipe, [], {"run": run})
        model.save_pretrained(tmp_path)  # knows less, and leaves the run's card
        assert f"| run | {run} |" in readme.read_text() and "| 16 tokens |" in readme.read_text()
    readme.write_text("# Written by hand")
    write_model_card(tmp_path, model, recipe, [], {})
    assert readme.read_text() == "# Written by hand"
