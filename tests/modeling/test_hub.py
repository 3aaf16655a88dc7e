"""Hub folders: loading with and without the package, uploads, and model cards, without network access."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers.modeling_utils
import transformers.utils.hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import linear_llama3
from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.modeling.hub import AUTO_CLASSES, AUTO_MAP, RUN_CARD, SAVED_CARD, SHIM
from linear_llama3.modeling.model_card import PIPELINE_TAGS, model_card, provenance
from tests.helpers.tiny import FILES, SIZES, file_names, tiny_config, tiny_model, tokens

ROOT = Path(__file__).resolve().parents[2]
OWN = "---\nlicense: mit\n---\n\n# Written by hand\n"


def test_one_table_serves_registration_auto_map_and_shim() -> None:
    shim: dict[str, Any] = {}
    exec(SHIM, shim)
    assert AUTO_MAP["AutoConfig"] == "linear_llama3_hub.LinearLlama3Config"
    assert AUTO_MAP.keys() == {"AutoConfig", *AUTO_CLASSES} and AUTO_CLASSES.keys() <= PIPELINE_TAGS.keys()
    for auto_class, name in AUTO_CLASSES.items():
        ours = getattr(linear_llama3, name)
        assert getattr(transformers, auto_class)._model_mapping[LinearLlama3Config] is ours
        assert AUTO_MAP[auto_class] == f"linear_llama3_hub.{name}" and shim[name] is ours
        assert name in linear_llama3.__all__


LOADING_TABLE = """
import builtins, importlib, json, sys
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
plain, shim, again, root = sys.argv[1:]
prompts, answer = [], "n"
builtins.input = lambda prompt: prompts.append(prompt) or answer

def outcome(folder, **flag):
    prompts.clear()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, **flag)
    except (ValueError, ImportError) as error:
        return f"{type(error).__name__}: {error}"

def check(got, kind, text, prompted):
    assert isinstance(got, str) and got.startswith(kind) and text in got, got
    assert [("Do you wish to run the custom code? [y/N]" in prompt) for prompt in prompts] == [True] * prompted, prompts

trust = {"trust_remote_code": True}
unknown = "model type `linear_llama3` but Transformers does not recognize this architecture"
untrusted = "contains custom code which must be executed to correctly load the model"

class NotInstalled:
    @staticmethod
    def find_spec(name, *args):
        if name == "linear_llama3":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled)
check(outcome(plain), "ValueError", unknown, 0)
check(outcome(plain, **trust), "ValueError", unknown, 0)
check(outcome(shim), "ValueError", untrusted, 1)
check(outcome(shim, trust_remote_code=False), "ValueError", "pass the argument `trust_remote_code=True`", 0)
check(outcome(shim, **trust), "ImportError", "needs the package linear_llama3, which is not installed", 0)
sys.meta_path.remove(NotInstalled)
sys.path.insert(0, root)
importlib.invalidate_caches()  # installed, but not imported
check(outcome(plain), "ValueError", unknown, 0)
check(outcome(plain, **trust), "ValueError", unknown, 0)
check(outcome(shim), "ValueError", untrusted, 1)
assert "linear_llama3" not in sys.modules
auto_map = json.load(open(shim + "/config.json"))["auto_map"]
loaded = {}
for auto_class in auto_map:
    masked = {"is_causal": False, "linear_attention_type": "basic"} if "MaskedLM" in auto_class else {}
    loaded[auto_class] = getattr(transformers, auto_class).from_pretrained(shim, **masked, **trust)
import linear_llama3
for auto_class, reference in auto_map.items():
    assert type(loaded[auto_class]) is getattr(linear_llama3, reference.split(".")[1]), (auto_class, loaded[auto_class])
assert type(loaded["AutoModelForCausalLM"].config) is linear_llama3.LinearLlama3Config
loaded["AutoModelForCausalLM"].save_pretrained(again)
for folder in (plain, shim):  # imported
    for flag in ({}, trust, {"trust_remote_code": False}):
        model = outcome(folder, **flag)
        assert type(model) is linear_llama3.LinearLlama3ForCausalLM and not prompts, model
"""


def test_loading_with_and_without_package_shim_and_trust(tmp_path: Path) -> None:
    """Package not installed, installed, imported; folder with and without shim; with and without trust. And what was
    loaded through the shim is saved as it was, so that it loads as before."""
    tiny_model().save_pretrained(tmp_path / "shim")
    shutil.copytree(tmp_path / "shim", tmp_path / "plain")
    (tmp_path / "plain" / "linear_llama3_hub.py").unlink()
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    folders = [str(tmp_path / name) for name in ("plain", "shim", "again")]
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOADING_TABLE, *folders, str(ROOT)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert file_names(tmp_path / "again") == FILES
    for name in FILES[1:]:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "shim" / name).read_bytes(), name


def test_remote_code_registration_changes_nothing(tmp_path: Path) -> None:
    """transformers calls this on classes loaded through auto_map; the next save must still write the shim."""
    LinearLlama3Config.register_for_auto_class()
    LinearLlama3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    tiny_model().save_pretrained(tmp_path)
    assert file_names(tmp_path) == FILES
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_saved_config_has_the_shim(tmp_path: Path) -> None:
    tiny_config("lightning").save_pretrained(tmp_path)
    assert file_names(tmp_path) == ["config.json", "linear_llama3_hub.py"]
    assert type(AutoConfig.from_pretrained(tmp_path)) is LinearLlama3Config


def test_a_saved_model_has_a_valid_card(tmp_path: Path) -> None:
    model = tiny_model("gla")
    model.save_pretrained(tmp_path / "my-model")
    card = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["linear_llama3", "linear-attention", "hybrid", "custom_code"],
    }
    assert "# my-model\n" in card.text and 'AutoModelForCausalLM.from_pretrained("my-model")' in card.text
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in card.text
    assert (
        "in 2 of 4 layers\n(2 x LN;" in card.text
        and "| 2 x 8 x 8 float32 |" in card.text
        and "Not recorded." in card.text
    )
    assert "{" not in card.text and "| longest" not in card.text and "## License" not in card.text
    assert "NOTICE" not in file_names(tmp_path / "my-model")


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_every_head_has_its_card(auto_class: str, tmp_path: Path) -> None:
    config = tiny_config("basic", full_attention_interval=0, is_causal="MaskedLM" not in auto_class)
    model = getattr(linear_llama3, AUTO_CLASSES[auto_class])(config)
    model.save_pretrained(tmp_path / "x")
    card = ModelCard.load(tmp_path / "x" / "README.md")
    assert card.data.pipeline_tag == PIPELINE_TAGS[auto_class] and "recurrent" in card.data.tags
    assert f'model = {auto_class}.from_pretrained("x")\n' in card.text
    assert ("generate" in card.text) == ("assisted" in card.text) == (auto_class == "AutoModelForCausalLM")
    assert type(getattr(transformers, auto_class).from_pretrained(tmp_path / "x")) is type(model)


def test_only_generated_cards_are_replaced(tmp_path: Path) -> None:
    """A save replaces its own card and transformers' placeholder, but neither a user's card nor that of a run."""
    readme = tmp_path / "README.md"
    tiny_model("gla").save_pretrained(tmp_path)
    tiny_model("lightning").save_pretrained(tmp_path)
    assert "| mixer of the linear layers | lightning |" in readme.read_text()
    for kept in (OWN.encode(), f"<!-- {RUN_CARD} -->".encode(), b"# caf\xe9", b""):
        readme.write_bytes(kept)
        tiny_model("gla").save_pretrained(tmp_path)
        assert readme.read_bytes() == kept and file_names(tmp_path) == FILES
    readme.write_text("This is the model card of a model. This model card has been automatically generated.")
    tiny_model("gla").save_pretrained(tmp_path)
    assert SAVED_CARD in readme.read_text()


@pytest.mark.parametrize(
    ("source", "origin"),
    [
        ("", {}),
        ("someone/tinyllama", {"base_model": "someone/tinyllama"}),
        ("someone/linear-llama3-1b", {"base_model": "someone/linear-llama3-1b"}),
        ("meta-llama/Llama-3.2-1B", {"base_model": "meta-llama/Llama-3.2-1B", "license": "llama3.2"}),
        ("NousResearch/Meta-Llama-3-8B-x", {"base_model": "NousResearch/Meta-Llama-3-8B-x", "license": "llama3"}),
        ("/gone/after/training", {}),
        ("runs/quickstart/model", {}),
    ],
)
def test_origin_of_weights_by_name(source: str, origin: dict[str, str]) -> None:
    assert provenance(source) == origin


@pytest.mark.parametrize(
    ("name", "card", "origin"),
    [
        ("Llama-3.1-8B-Instruct", None, {"base_model": "meta-llama/Llama-3.1-8B-Instruct", "license": "llama3.1"}),
        ("Llama-3.1-8B-mine", None, {"license": "llama3.1"}),
        ("Llama-3.2-1B", "license: llama3.2", {"base_model": "meta-llama/Llama-3.2-1B", "license": "llama3.2"}),
        ("copy", "license: llama3.2\nbase_model: a/b", {"base_model": "a/b", "license": "llama3.2"}),
        ("copy", "license: other\nlicense_name: x", {"license": "other", "license_name": "x"}),
        ("copy", "license: [", {}),
        ("copy", None, {}),
    ],
)
def test_origin_of_weights_by_folder(name: str, card: str | None, origin: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    if card is not None:
        (tmp_path / name / "README.md").write_text(f"---\n{card}\n---\n\n# A model\n")
    assert provenance(str(tmp_path / name)) == origin


def test_llamas_license_is_passed_on(tmp_path: Path) -> None:
    """From Llama's folder to ours, from ours to the next, and through the Hub; also if the source no longer exists."""
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    llama.save_pretrained(tmp_path / "Llama-3.2-1B")
    config = LinearLlama3Config.from_llama(tmp_path / "Llama-3.2-1B", linear_attention_type="gla")
    converted = LinearLlama3ForCausalLM.from_pretrained(tmp_path / "Llama-3.2-1B", config=config)
    converted.save_pretrained(tmp_path / "converted")
    LinearLlama3ForCausalLM.from_pretrained(tmp_path / "converted").save_pretrained(tmp_path / "next")
    for name in ("converted", "next"):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.get("license") == "llama3.2" and card.data.get("base_model") == "meta-llama/Llama-3.2-1B"
        assert "Built with Llama. Llama 3.2 is licensed under the Llama 3.2 Community License" in card.text
        notice = (tmp_path / name / "NOTICE").read_text()
        assert notice.endswith("Copyright © Meta Platforms, Inc. All Rights Reserved.\n")
    hub = tmp_path / "hub" / "models--me--converted"  # the same from a repository
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tmp_path / "converted", hub / "snapshots" / ("a" * 40))
    again = LinearLlama3ForCausalLM.from_pretrained("me/converted", cache_dir=tmp_path / "hub")
    shutil.rmtree(tmp_path / "hub")
    for repo_id, base_model in (("me/again", "me/converted"), ("me/converted", None)):
        card = model_card(again, repo_id=repo_id)
        assert (
            card.data.get("license") == "llama3.2"
            and card.data.get("base_model") == base_model
            and "Built with" in card.text
        )
    (tmp_path / "next" / "NOTICE").write_text("mine")
    converted.save_pretrained(tmp_path / "next")
    assert (tmp_path / "next" / "NOTICE").read_text() == "mine"


class FakeHub:
    """A repository, with or without a card, that records uploads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, card: str | None = None) -> None:
        self.repo_id = ""
        self.card = card
        self.files: dict[str, bytes] = {}
        monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: self)
        monkeypatch.setattr(transformers.modeling_utils, "hf_api", lambda: self)
        monkeypatch.setattr(transformers.utils.hub.ModelCard, "load", self.load_card)

    def load_card(self, repo_id: str, **kwargs: Any) -> ModelCard:
        if self.card is None:
            raise LocalEntryNotFoundError("no README.md")
        return ModelCard(self.card)

    def create_repo(self, repo_id: str, **kwargs: Any) -> FakeHub:
        self.repo_id = repo_id
        return self

    def create_commit(self, *, operations: list[Any], **kwargs: Any) -> None:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()

    def download(self, folder: Path) -> Path:
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder


@pytest.mark.parametrize("before", [None, f"<!-- {SAVED_CARD} -->\n\n# Of an older model"])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_an_upload_loads(way: str, before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The uploaded files include our card and give the same logits."""
    hub, model = FakeHub(monkeypatch, card=before), tiny_model()
    if way == "push_to_hub":
        model.push_to_hub("someone/my-model", max_shard_size="20KB")
    else:
        model.save_pretrained(tmp_path / "x", push_to_hub=True, repo_id="someone/my-model", max_shard_size="20KB")
        assert file_names(tmp_path / "x") == sorted(hub.files)
    monkeypatch.undo()
    assert hub.repo_id == "someone/my-model"
    weights = {name for name in hub.files if name.startswith("model")}
    assert "model.safetensors.index.json" in weights and len(weights) > 2
    assert sorted(hub.files.keys() - weights) == FILES[:-1]
    folder = hub.download(tmp_path / "downloaded")
    card = ModelCard.load(folder / "README.md")
    assert card.data.get("tags") == ["linear_llama3", "linear-attention", "hybrid", "custom_code"]
    assert "# my-model\n" in card.text and 'from_pretrained("someone/my-model")' in card.text
    with torch.no_grad():
        expected = model(tokens(1, 9)).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens(1, 9)).logits, expected)


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_upload_keeps_the_repository_card(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, card=OWN)
    if way == "push_to_hub":
        tiny_model().push_to_hub("someone/my-model")
    else:
        (tmp_path / "README.md").write_text("# mine, here")
        tiny_model().save_pretrained(tmp_path, push_to_hub=True)
        assert (tmp_path / "README.md").read_text() == "# mine, here"
    card = ModelCard(hub.files["README.md"].decode())
    assert "# Written by hand" in card.text and card.data.get("license") == "mit"
    assert card.data.get("tags") == ["linear_llama3"]
    assert sorted(hub.files) == FILES


def test_upload_of_a_users_own_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch)
    (tmp_path / "README.md").write_text(OWN)
    tiny_model().save_pretrained(tmp_path, push_to_hub=True)
    assert hub.files["README.md"].decode() == OWN == (tmp_path / "README.md").read_text()


def test_upload_of_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch)
    tiny_config().push_to_hub("someone/config")
    assert sorted(hub.files) == ["README.md", "config.json", "linear_llama3_hub.py"]
    assert json.loads(hub.files["config.json"])["auto_map"] == AUTO_MAP
