"""Checkpoints: round trips, meta-device loading, the Hub shim, and saves that are interrupted."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
import transformers.utils.hub
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModel, AutoModelForCausalLM

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM, LinearLlama3Model
from tests.modeling.tiny import MIXER_NAMES, tiny_model, tokens

ROOT = Path(__file__).resolve().parents[2]
FILES = ["config.json", "generation_config.json", "linear_llama3_hub.py", "model.safetensors"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(1, 9)).logits


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_round_trip(mixer: str, max_shard_size: str, tmp_path: Path) -> None:
    model = tiny_model(mixer)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LinearLlama3ForCausalLM
    assert torch.equal(logits(loaded), logits(model))
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is LinearLlama3Model
    if max_shard_size == "1GB":
        assert names(tmp_path) == FILES
    else:
        assert len(names(tmp_path)) > len(FILES)
    half = LinearLlama3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_meta_device_loading_restores_buffers_and_fresh_parameters(
    mixer: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """from_pretrained builds on the meta device; what the file lacks must come out as in a direct build."""
    model = tiny_model(mixer)
    own = ("o_norm", "decay_bias")
    state_dict = {name: value for name, value in model.state_dict().items() if not any(o in name for o in own)}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    loaded = LinearLlama3ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    buffers = dict(model.named_buffers())
    assert mixer not in ("lightning", "retention") or any("log_decay" in name for name in buffers)
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name].to(dtype)), name


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_pickle(mixer: str) -> None:
    """A model can be sent to a process that is spawned."""
    model = tiny_model(mixer)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


def test_tied_weights(tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    loaded = LinearLlama3ForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def fail_at_shard(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The disk fills up in the middle of writing shard `number`."""
    save_file, count = transformers.modeling_utils.safe_save_file, [0]

    def failing(tensors: Any, filename: str, metadata: Any = None) -> None:
        count[0] += 1
        if count[0] == number:
            Path(filename).write_bytes(b"half a file")
            raise OSError("No space left on device")
        save_file(tensors, filename, metadata=metadata)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", failing)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("shard", [1, 2])
def test_interrupted_save_leaves_the_previous_checkpoint(
    shard: int, max_shard_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tiny_model("gla", seed=0), tiny_model("gla", seed=1)
    first.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        fail_at_shard(patch, shard)
        with pytest.raises(OSError, match="No space left"):
            second.save_pretrained(tmp_path, max_shard_size="20KB")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    second.save_pretrained(tmp_path, max_shard_size="20KB")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(second))


def test_what_a_killed_save_left_behind_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "model.safetensors").write_bytes(b"half a file")
    tiny_model().save_pretrained(tmp_path)
    assert names(tmp_path) == FILES


def test_changing_the_number_of_shards(tmp_path: Path) -> None:
    """The loader prefers an old single file to new shards, so the old weights must go. Other files must stay."""
    (tmp_path / "tokenizer.json").write_text("{}")
    for seed, size in ((0, "1GB"), (1, "20KB"), (2, "40KB"), (3, "1GB")):
        model = tiny_model(seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert names(tmp_path) == sorted([*FILES, "tokenizer.json"])


def test_variants_live_side_by_side(tmp_path: Path) -> None:
    plain, ema = tiny_model(seed=0), tiny_model(seed=1)
    plain.save_pretrained(tmp_path)
    ema.save_pretrained(tmp_path, variant="ema", max_shard_size="20KB")
    ema.save_pretrained(tmp_path, variant="ema")
    assert names(tmp_path) == sorted([*FILES, "model.ema.safetensors"])
    assert torch.equal(logits(LinearLlama3ForCausalLM.from_pretrained(tmp_path)), logits(plain))
    assert torch.equal(logits(LinearLlama3ForCausalLM.from_pretrained(tmp_path, variant="ema")), logits(ema))


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "out", is_main_process=False)
    assert names(tmp_path / "out") == []


def test_remote_code_registration_changes_nothing(tmp_path: Path) -> None:
    """transformers calls this on what it loads through auto_map; the next save must still write the shim."""
    LinearLlama3Config.register_for_auto_class()
    LinearLlama3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    tiny_model().save_pretrained(tmp_path)
    assert names(tmp_path) == FILES
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "linear_llama3_hub.LinearLlama3ForCausalLM"


HUB_TABLE = """
import sys
from transformers import AutoModelForCausalLM
folder, saved_again, root = sys.argv[1:]

def refusal(**kwargs):
    try:
        AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    except (ValueError, ImportError) as error:
        return type(error).__name__ + ": " + str(error)

class NotInstalled:
    @staticmethod
    def find_spec(name, *args):
        if name == "linear_llama3":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled)
message = refusal(trust_remote_code=True)
assert message.startswith("ImportError") and "pip install linear_llama3" in message, message
sys.meta_path.remove(NotInstalled)
sys.path.insert(0, root)
message = refusal(trust_remote_code=False)
assert message.startswith("ValueError") and "trust_remote_code=True" in message, message
assert "linear_llama3" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
import linear_llama3
assert type(model) is linear_llama3.LinearLlama3ForCausalLM, type(model)
assert type(model.config) is linear_llama3.LinearLlama3Config
model.save_pretrained(saved_again)
AutoModelForCausalLM.from_pretrained(saved_again)
"""


def test_hub_loading_without_importing_the_package(tmp_path: Path) -> None:
    """The shim's row of the table: not installed, not trusted, trusted; and a save of what was loaded."""
    tiny_model().save_pretrained(tmp_path / "model")
    arguments = [sys.executable, "-c", HUB_TABLE, str(tmp_path / "model"), str(tmp_path / "again"), str(ROOT)]
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "again") == FILES


class FakeHub:
    """Records what would be uploaded."""

    def __init__(self) -> None:
        self.repo_id = ""
        self.files: list[str] = []

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        self.repo_id = repo_id
        return self

    def create_commit(self, *, operations: list[Any], **kwargs: Any) -> None:
        self.files = sorted(operation.path_in_repo for operation in operations)


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_push_to_hub(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, tags = FakeHub(), []

    def card(repo_id: str, tags_given: list[str] | None = None, **kwargs: Any) -> ModelCard:
        tags.extend(tags_given or [])
        return ModelCard.from_template(ModelCardData(tags=tags_given), template_str="---\n{{ card_data }}\n---\n")

    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.modeling_utils, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", card)
    monkeypatch.setattr(transformers.modeling_utils, "create_and_tag_model_card", card)
    if way == "push_to_hub":
        tiny_model().push_to_hub("someone/my-model")
        assert hub.repo_id == "someone/my-model"
    else:
        tiny_model().save_pretrained(tmp_path / "my-model", push_to_hub=True)
        assert hub.repo_id == "my-model"
        assert names(tmp_path / "my-model") == sorted([*FILES, "README.md"])
    assert hub.files == sorted([*FILES, "README.md"])
    assert tags == ["linear_llama3", "linear-attention"]
