"""Tiny runs of the Trainer on CPUs, and their comparison."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM
from linear_llama3.trainer import LinearLlama3Trainer

LENGTH = 13  # no multiple of any number of ranks
GRIDS = [(1, 1), (2, 2), (2, 1), (4, 2), (4, 4)]  # (processes, sequence-parallel degree)


def tiny_config(**changes: Any) -> LinearLlama3Config:
    fields: dict[str, Any] = {
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "linear_attention_type": "gla",
        "gate_bias_init": 0.0,
        "full_attention_interval": 2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LinearLlama3Config(**{**fields, **changes})


def tiny_model() -> LinearLlama3ForCausalLM:
    torch.manual_seed(0)
    return LinearLlama3ForCausalLM(tiny_config())


def rows(packed: bool) -> list[dict[str, Tensor]]:
    """Eight rows with very uneven labels: the loss of a row's last part, or of all but it, does not count."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for i in range(8):
        ids = torch.randint(23, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: 12 if i % 3 == 0 else 0] = -100
        labels[5 if i % 3 == 1 else LENGTH :] = -100
        row = {"input_ids": ids, "labels": labels}
        if packed:
            row["position_ids"] = torch.cat([torch.arange(4 + i % 4), torch.arange(LENGTH - 4 - i % 4)])
        out.append(row)
    return out


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def arguments(folder: str, replicas: int, **changes: Any) -> dict[str, Any]:
    """Two optimizer steps of 4 rows each, whatever the number of data-parallel processes."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2 // replicas,
        "per_device_eval_batch_size": 2 // replicas,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **changes,
    }


def outcome(trainer: Trainer) -> dict[str, Any]:
    """(loss, gradient norm) per step, the parameters, the tokens."""
    parameters = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().numpy()  # FSDP2's are parts
        for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    }
    return {
        "history": [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log],
        "parameters": parameters,
        "tokens": trainer.state.num_input_tokens_seen,
        "flops": trainer.state.total_flos,
    }


def assert_same(run: dict[str, Any], one: dict[str, Any], where: Any) -> None:
    for got, expected in zip(run["history"], one["history"], strict=True):
        assert got == pytest.approx(expected, rel=2e-4), where
    for name, expected in one["parameters"].items():
        assert abs(run["parameters"][name] - expected).max() < 2e-5, (where, name)
    assert run["tokens"] == one["tokens"], where
    assert run["flops"] == pytest.approx(one["flops"], rel=1e-6), where


class SequentialTrainer(LinearLlama3Trainer):
    """Rows in their order, so that every grid sees the same ones in a step."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def shard_on_cpus(trainer: Any) -> None:
    """FSDP2 for a Trainer whose Accelerator has just been made."""
    state = trainer.accelerator.state
    PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LinearLlama3DecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    trainer.is_fsdp_enabled = True
