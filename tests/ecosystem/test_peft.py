"""PEFT's LoRA on linear and softmax layers: gradients by the definition W + s B A, training, saving, merging, and
sequence parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.trainer import LinearLlama3TrainingArguments
from tests.helpers.adapters import SCALE, adapted, adapters
from tests.helpers.checkpoint import assert_documents_alone, documents, load, loss_alone
from tests.helpers.marks import slow_unless
from tests.helpers.ranks import run_distributed
from tests.helpers.training import SequentialTrainer, arguments, outcome, reset_accelerate

LLAMA_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("all-linear", {"mlp", "q_proj", "k_proj", "v_proj", "o_proj", "g_proj", "decay_down_proj", "decay_up_proj"}),
        (LLAMA_NAMES, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
    ids=["all-linear", "Llama's names"],
)
def test_target_modules_cover_linear_and_softmax_layers(
    target_modules: Any, expected: set[str], checkpoint: Path
) -> None:
    """PEFT has no default for this model type and asks for target_modules."""
    model = adapted(checkpoint, target_modules)
    layers = {name.split(".layers.")[1].split(".lora_")[0] for name in adapters(model)}
    for index, kind in enumerate(model.config.layer_types):
        own = {name.split(".")[-1] if "self_attn" in name else "mlp" for name in layers if name[0] == str(index)}
        in_softmax = expected - {"g_proj", "decay_down_proj", "decay_up_proj"}
        assert own == (expected if kind == "linear_attention" else in_softmax), index
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(load(checkpoint), LoraConfig())


def test_prefix_tuning_is_refused(checkpoint: Path) -> None:
    """It passes keys and values to every layer, but a state has none."""
    model = get_peft_model(load(checkpoint), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="layer 0 is linear and keeps a state"):
        model(documents(checkpoint)[0][None])


def merged_by_hand(folder: Path, lora: PeftModel) -> LinearLlama3ForCausalLM:
    """Return the checkpoint with W + s B A in place of every adapted W."""
    plain = load(folder).to(lora.dtype)
    matrices = adapters(lora)
    with torch.no_grad():
        for name, a in matrices.items():
            if "lora_A" in name:
                module = plain.get_submodule(name.removeprefix("base_model.model.").split(".lora_")[0])
                assert isinstance(module, nn.Linear)
                module.weight += SCALE * matrices[name.replace("lora_A", "lora_B")] @ a
    return plain


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["", "checkpointing", "re-entrant checkpointing"])
def test_gradients_by_the_definition(reentrant: bool | None, checkpoint: Path) -> None:
    """Only adapters have gradients: dA = s B^T dW and dB = s dW A^T of the plain model with W + s B A."""
    lora, rows = adapted(checkpoint).double().train(), documents(checkpoint)
    if reentrant is not None:
        lora.gradient_checkpointing_enable({"use_reentrant": reentrant})
        lora.enable_input_require_grads()
    plain = merged_by_hand(checkpoint, lora)
    loss, expected_loss = loss_alone(lora, rows), loss_alone(plain, rows)
    loss.backward()
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-10)
    matrices = adapters(lora)
    assert {name for name, p in lora.named_parameters() if p.grad is not None} == set(matrices)
    for name, matrix in matrices.items():
        weight = plain.get_parameter(name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight").grad
        b, a = matrices[name.replace("lora_A", "lora_B")], matrices[name.replace("lora_B", "lora_A")]
        expected = SCALE * (b.T @ weight if "lora_A" in name else weight @ a.T)
        assert (matrix.grad - expected).norm() <= 1e-10 * expected.norm(), name


def test_train_save_load_merge(checkpoint: Path, tmp_path: Path) -> None:
    lora, rows = adapted(checkpoint), documents(checkpoint)
    optimizer, losses = torch.optim.AdamW(adapters(lora).values(), lr=0.02), []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(loss_alone(lora, rows))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    ids, base = rows[3][None], load(checkpoint)
    for name, parameter in base.named_parameters():
        stem, _, leaf = name.rpartition(".")
        kept = dict(lora.get_base_model().named_parameters())
        assert torch.equal(kept[name if name in kept else f"{stem}.base_layer.{leaf}"], parameter), name
    with torch.no_grad():
        expected = lora.eval()(ids).logits
        lora.save_pretrained(str(tmp_path / "adapter"))
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.equal(loaded(ids).logits, expected)
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(ids).logits, expected)
        merged = loaded.merge_and_unload()
        assert type(merged) is LinearLlama3ForCausalLM
        assert (merged(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(again(ids).logits, merged(ids).logits)
    tokens = merged.generate(ids[:, :9], max_new_tokens=5, do_sample=False)
    assert torch.equal(lora.generate(input_ids=ids[:, :9], max_new_tokens=5, do_sample=False), tokens)


def fine_tune(checkpoint: str, folder: str, checkpointing: bool) -> dict[str, Any]:
    """Take two steps of gradient descent on all documents in one packed row, sharded over the processes."""
    reset_accelerate()
    rows = documents(checkpoint)
    ids = torch.cat(rows)
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    packed = {"input_ids": ids, "labels": ids.where(positions > 0, -100), "position_ids": positions}
    steps = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 0.05}
    args = LinearLlama3TrainingArguments(**arguments(folder, 1, gradient_checkpointing=checkpointing, **steps))
    trainer = SequentialTrainer(model=adapted(checkpoint), args=args, train_dataset=[packed] * 2)
    trainer.train()
    trainer.save_model(folder)
    reset_accelerate()
    return outcome(trainer)


@slow_unless(
    lambda world_size, checkpointing: world_size == 2 and checkpointing, world_size=[1, 2], checkpointing=[False, True]
)
def test_sequence_parallel_training_equals_documents_alone(
    world_size: int, checkpointing: bool, checkpoint: Path, tmp_path: Path
) -> None:
    runs = run_distributed(fine_tune, world_size, str(checkpoint), str(tmp_path), checkpointing)
    assert_documents_alone(runs, adapted(checkpoint), documents(checkpoint), learning_rate=0.05)
    base = load(checkpoint)
    for run in runs:
        for name, parameter in adapted(checkpoint).named_parameters():
            assert parameter.requires_grad or (run["parameters"][name] == parameter.numpy(force=True)).all(), name
    loaded = PeftModel.from_pretrained(base, tmp_path)
    for name, parameter in loaded.named_parameters():
        assert (runs[0]["parameters"][name] == parameter.numpy(force=True)).all(), name
