"""Checkpoints: round trips, meta-device loading, and saves that are interrupted."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from transformers import AutoModel, AutoModelForCausalLM

from linear_llama3 import LinearLlama3ForCausalLM, LinearLlama3Model
from tests.helpers.tiny import FILES, MIXER_NAMES, file_names, tiny_model, tokens


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
        assert file_names(tmp_path) == FILES
    else:
        assert len(file_names(tmp_path)) > len(FILES)
    half = LinearLlama3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_meta_device_loading_restores_buffers_and_fresh_parameters(
    mixer: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """from_pretrained builds on the meta device; missing values must equal those of a new model."""
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
def test_a_pickled_model_gives_the_same_logits(mixer: str) -> None:
    """Needed to send a model to a spawned process."""
    model = tiny_model(mixer)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    loaded = LinearLlama3ForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def fail_at_shard(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the disk fill up while shard `number` is written."""
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


def test_files_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "model.safetensors").write_bytes(b"half a file")
    tiny_model().save_pretrained(tmp_path)
    assert file_names(tmp_path) == FILES


def test_a_save_with_fewer_or_more_shards_removes_old_weights(tmp_path: Path) -> None:
    """The loader prefers an old single file to new shards. Other files must stay."""
    (tmp_path / "tokenizer.json").write_text("{}")
    for seed, size in ((0, "1GB"), (1, "20KB"), (2, "40KB"), (3, "1GB")):
        model = tiny_model(seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert file_names(tmp_path) == sorted([*FILES, "tokenizer.json"])


def test_variants_do_not_replace_each_other(tmp_path: Path) -> None:
    plain, ema = tiny_model(seed=0), tiny_model(seed=1)
    plain.save_pretrained(tmp_path)
    ema.save_pretrained(tmp_path, variant="ema", max_shard_size="20KB")
    ema.save_pretrained(tmp_path, variant="ema")
    assert file_names(tmp_path) == sorted([*FILES, "model.ema.safetensors"])
    assert torch.equal(logits(LinearLlama3ForCausalLM.from_pretrained(tmp_path)), logits(plain))
    assert torch.equal(logits(LinearLlama3ForCausalLM.from_pretrained(tmp_path, variant="ema")), logits(ema))


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "out", is_main_process=False)
    assert file_names(tmp_path / "out") == []
