"""FSDP2 with mixed precision over gloo: only weights and activations have 16 bits."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Trainer

from linear_llama3 import LinearLlama3ForCausalLM
from linear_llama3.sequence_parallel import SequenceParallelConfig, SequenceParallelContext, enable_sequence_parallel
from linear_llama3.sequence_parallel.collectives import all_reduce
from linear_llama3.trainer import LinearLlama3TrainingArguments, SequenceParallelAccelerator
from linear_llama3.trainer.parallelism import keep_precision
from scripts.traffic import Traffic
from tests.helpers.ranks import run_distributed
from tests.helpers.training import SequentialTrainer, arguments, reset_accelerate, shard_on_cpus, tiny_config

LABELS = 511  # 512 in bfloat16
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16)  # casts inputs, as by default


class RecordingForCausalLM(LinearLlama3ForCausalLM):
    """Record the label counts and the rotary tables that reach the model and its layers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.counts: list[Any] = []
        self.tables: list[Tensor] = []
        self.register_forward_pre_hook(self._note_count, with_kwargs=True)
        for layer in self.model.layers:
            layer.get_submodule("self_attn").register_forward_pre_hook(self._note_tables, with_kwargs=True)

    def _note_count(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.counts.append(kwargs.get("num_items_in_batch"))

    def _note_tables(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.tables += kwargs["position_embeddings"]


def model() -> RecordingForCausalLM:
    """Linear and softmax layers, all with rotary embeddings."""
    torch.manual_seed(0)
    return RecordingForCausalLM(tiny_config(linear_attention_type="retention"))


def batch() -> dict[str, Tensor]:
    ids = torch.randint(23, (1, LABELS + 1), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def apply_fsdp(model: RecordingForCausalLM, policy: MixedPrecisionPolicy) -> RecordingForCausalLM:
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def accelerates_policy() -> MixedPrecisionPolicy:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    keep_precision(SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin)))  # type: ignore[arg-type]
    return plugin.mixed_precision_policy


def enabled(model: RecordingForCausalLM, **strategies: str) -> SequenceParallelContext:
    context = SequenceParallelContext(dist.group.WORLD, SequenceParallelConfig(**strategies))
    enable_sequence_parallel(model, context)
    return context


def loss_and_gradients() -> list[tuple[float, dict[str, Tensor]]]:
    """Return results of FSDP2 with accelerate's policy, and of bfloat16 copies with gradients summed in float32."""
    runs = []
    for sharded in (False, True):
        net = apply_fsdp(model(), accelerates_policy()) if sharded else model().bfloat16()
        local = enabled(net).shard_batch(batch())
        loss = net(**local, num_items_in_batch=torch.tensor(LABELS)).loss
        assert loss.dtype == torch.float32 and net.counts == [LABELS]
        loss.backward()
        gradients: dict[str, Any] = {name: p.grad for name, p in net.named_parameters()}
        if sharded:
            gradients = {name: g.full_tensor() * dist.get_world_size() for name, g in gradients.items()}  # a mean
        else:
            world: Any = dist.group.WORLD
            gradients = {name: all_reduce(g.float(), world).wait() for name, g in gradients.items()}
        assert all(g.dtype == torch.float32 for g in gradients.values())
        runs.append((loss.item(), gradients))
    return runs


def test_loss_and_gradients_are_those_of_float32_master_weights() -> None:
    for copies, sharded in run_distributed(loss_and_gradients, 2):
        assert sharded[0] == pytest.approx(copies[0], rel=1e-6)
        for name, expected in copies[1].items():
            assert abs(sharded[1][name] - expected).max() <= 1e-6 * abs(expected).max(), name


def tables_in_layers(checkpointing: bool) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    net = model()
    local = enabled(net).shard_batch(batch())
    expected = net.model.rotary_emb(torch.zeros(1), position_ids=local["position_ids"])
    apply_fsdp(net, HALF)
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    net(**local, num_items_in_batch=LABELS).loss.backward()
    return net.tables, expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rotary_tables_stay_float32_inside_layers(checkpointing: bool) -> None:
    for tables, expected in run_distributed(tables_in_layers, 2, checkpointing):
        assert len(tables) == 2 * 4 * (1 + checkpointing)
        for got, table in zip(tables, expected * (len(tables) // 2), strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, table)


def messages(policy: MixedPrecisionPolicy | None, checkpointing: bool) -> int:
    """Count exchanges between ranks, forward and backward, apart from FSDP2's collectives."""
    net = model().train()
    local = enabled(net, linear="lasp1", softmax="ring").shard_batch(batch())
    if policy is not None:
        apply_fsdp(net, policy)
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    with Traffic() as traffic:
        net(**local, num_items_in_batch=LABELS).loss.backward()
    return traffic.messages["send"]


@pytest.mark.parametrize(
    "policy", [HALF, pytest.param(MixedPrecisionPolicy(), marks=pytest.mark.slow)], ids=["bfloat16", "float32"]
)
def test_a_recomputed_layer_exchanges_nothing_again(policy: MixedPrecisionPolicy) -> None:
    plain = run_distributed(messages, 2, None, False)
    assert all(plain)
    assert run_distributed(messages, 2, policy, False) == plain
    assert run_distributed(messages, 2, policy, True) == plain


def loss_of_many_labels(count: Any) -> float | str:
    """The count in float16, whose largest value is 65,504."""
    net = apply_fsdp(model(), MixedPrecisionPolicy(param_dtype=torch.float16))
    local = enabled(net).shard_batch(batch())
    try:
        world: Any = dist.group.WORLD
        return all_reduce(net(**local, num_items_in_batch=count).loss.detach(), world).wait().item()
    except ValueError as error:
        return str(error)


def test_counts_of_labels_are_exact_or_refused() -> None:
    """An error for users who call `fully_shard` themselves."""
    with torch.no_grad():
        expected = model()(**batch(), num_items_in_batch=131072).loss.item()
    for count in (131072, torch.tensor(131072)):
        for loss in run_distributed(loss_of_many_labels, 2, count):
            assert loss == pytest.approx(expected, rel=1e-3)
    for message in run_distributed(loss_of_many_labels, 2, torch.tensor(131072.0)):
        assert "num_items_in_batch must be exact, got torch.float16" in message


def test_without_a_context_a_rounded_count_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a warning, so that transformers' own Trainer remains usable."""
    warnings: list[str] = []
    monkeypatch.setattr("linear_llama3.modeling.inputs.logger.warning_once", warnings.append)
    loss = model()(**batch(), num_items_in_batch=torch.tensor(512, dtype=torch.bfloat16)).loss
    assert loss > 0 and len(warnings) == 1 and "must be exact, got torch.bfloat16" in warnings[0]


class FsdpOnCpus(Trainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard_on_cpus(self)
        if self.args.bf16:
            self.accelerator.state.fsdp_plugin.set_mixed_precision("bf16")  # as accelerate does on GPUs


class HalfTrainer(SequentialTrainer, FsdpOnCpus):
    """Rows in order, weights sharded by FSDP2."""


def train(degree: int, bf16: bool, folder: str, average: bool = True) -> dict[str, Any]:
    """Train two steps of two accumulated batches with 511 labels in total."""
    reset_accelerate()
    replicas = dist.get_world_size() // degree
    ids = torch.randint(23, (8, 129), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row.clone()} for row in ids]
    for step in (0, 4):
        data[step]["labels"][1] = -100  # 4 * 128 - 1
    changes = {"sequence_parallel_size": degree, "bf16": bf16, "average_tokens_across_devices": average}
    args = LinearLlama3TrainingArguments(**arguments(folder, replicas, **changes))
    trainer = (HalfTrainer if dist.get_world_size() > 1 else SequentialTrainer)(
        model=model(), args=args, train_dataset=data
    )
    trainer.train()
    history = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    evaluated = trainer.evaluate(data[:4])["eval_loss"]
    counts = [float(count) for count in trainer.accelerator.unwrap_model(trainer.model).counts]
    reset_accelerate()
    return {"losses": history, "counts": counts, "eval": evaluated}


@pytest.mark.parametrize("grids", [[(2, 2)], pytest.param([(2, 1), (4, 2)], marks=pytest.mark.slow)], ids=str)
def test_trainer(grids: list[tuple[int, int]], tmp_path: Path) -> None:
    """Losses equal those of one float32 process to less than the spacing of bfloat16 (1/64 at 3)."""
    (one,) = run_distributed(train, 1, 1, False, str(tmp_path))
    for world, degree in grids:
        for run in run_distributed(train, world, degree, True, str(tmp_path)):
            assert set(run["counts"][:4]) == {511}, (world, degree)
            assert run["losses"] == pytest.approx(one["losses"], rel=1e-3), (world, degree)
            assert run["eval"] == pytest.approx(one["eval"], rel=1e-3), (world, degree)
            for loss in (*run["losses"], run["eval"]):
                assert torch.tensor(loss).bfloat16().item() != loss, "rounded"


def test_trainer_with_counts_of_its_own(tmp_path: Path) -> None:
    """average_tokens_across_devices=False: two ranks share the labels of one sequence."""
    for run in run_distributed(train, 2, 2, True, str(tmp_path), False):
        assert set(run["counts"][:4]) == {255.5}


def policy_of(policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy | str:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=policy)
    try:
        keep_precision(SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin)))  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return plugin.mixed_precision_policy


def test_policies() -> None:
    """accelerate's policy is replaced; a caller's own is kept unless it rounds the loss."""
    half = torch.bfloat16
    ours = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    assert policy_of(MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, output_dtype=half)) == ours
    for own in (ours, MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half)):
        assert policy_of(copy.copy(own)) == own
    message = policy_of(MixedPrecisionPolicy(param_dtype=half, output_dtype=half))
    assert isinstance(message, str) and "must leave the loss in float32, got output_dtype=torch.bfloat16" in message


def count_of_own_loop() -> float:
    reset_accelerate()
    accelerator = SequenceParallelAccelerator(cpu=True, sequence_parallel_size=2)
    count = accelerator.num_items(batch())
    reset_accelerate()
    return count


def test_accelerator_counts_in_python_numbers() -> None:
    for count in run_distributed(count_of_own_loop, 2):
        assert type(count) is float and count == LABELS / 2  # DDP and FSDP2 divide by 2
