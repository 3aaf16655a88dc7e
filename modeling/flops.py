"""Floating-point operations of a model, and their share of the device's peak (model FLOPs utilization, MFU).

The count follows PaLM (arXiv:2204.02311, appendix B): the operations in the definition of the model, independent of the
implementation. A multiply-add counts as two. Forward pass, per token:

    projections, MLP, head  2 for every weight
    softmax attention       4 head_dim H_q for every visible key: (T + 1) / 2 of them on average in a causal document of
                            T tokens, T in a bidirectional one
    linear attention        2 F C (H_kv + H_q) with states of F features by C columns (D_k by D_v, including the
                            normalizer's column): each kv head's state is written, each query head reads. This is
                            the recurrence, without intra-chunk products: (F + C) H_q (n + 1) with n tokens per chunk
    learned feature maps    2 D_k^2 H with a matrix per head (Hedgehog)

The backward pass needs twice the forward pass, except gradients of frozen weights (LoRA's base). Not counted:
element-wise work (norms, rotary embedding, gates, decays, the softmax itself, polynomial feature maps), the embedding,
the optimizer, and recomputation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ..ops.documents import document_edges
from .attention import LinearLlama3Attention
from .mixers import LearnedFeatureMap, LinearAttention


@dataclass(slots=True, kw_only=True)
class Flops:
    """Floating-point operations of one forward pass by part, and their sums for a pass and for a training step."""

    projections: int = 0
    mlp: int = 0
    head: int = 0
    feature_maps: int = 0
    softmax_attention: int = 0
    linear_attention: int = 0
    frozen: int = 0  # gradients that the backward pass does not compute

    @property
    def forward(self) -> int:
        """Operations of a forward pass."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "frozen")

    @property
    def training(self) -> int:
        """Operations of a forward and a backward pass, the numerator of MFU."""
        return 3 * self.forward - self.frozen


def count_flops(model: nn.Module, tokens: int, pairs: int) -> Flops:
    """Count the FLOPs of a model of this package, with any head and with PEFT adapters.

    Args:
        model: may be on the meta device.
        tokens: number of tokens in the batch, padding included.
        pairs: number of pairs of a query and a visible key (`attention_pairs`).
    """
    flops = Flops()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "original_module" not in name:  # PEFT trains a copy of that one
            part = "mlp" if ".mlp." in name else "projections" if ".self_attn." in name else "head"
            work = 2 * tokens * module.in_features * module.out_features
            setattr(flops, part, getattr(flops, part) + work)
            flops.frozen += 0 if module.weight.requires_grad else work
        elif isinstance(module, LearnedFeatureMap):
            matrices = [p for p in module.parameters() if p.dim() > 1]  # vectors scale, element by element
            flops.feature_maps += sum(2 * tokens * p.numel() for p in matrices)
            flops.frozen += sum(2 * tokens * p.numel() for p in matrices if not p.requires_grad)
        elif isinstance(module, LinearAttention):
            kv_heads, features, columns = module.config.linear_state_shape
            flops.linear_attention += 2 * tokens * features * columns * (kv_heads + module.num_heads)
        elif isinstance(module, LinearLlama3Attention):
            flops.softmax_attention += 4 * pairs * module.head_dim * module.config.num_attention_heads
    return flops


def attention_pairs(lengths: Iterable[int], *, causal: bool = True) -> int:
    """Return the number of pairs of a query and a visible key in documents of these lengths."""
    return sum(length * (length + 1) // 2 if causal else length**2 for length in lengths)


def batch_flops(model: nn.Module, batch: Mapping[str, Any]) -> Flops:
    """Count the FLOPs of a batch from the data loader; documents are recognized as in the model's forward pass."""
    inputs = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
    rows, length = inputs.shape[:2]
    edges = document_edges(batch, batch.get("attention_mask"), batch=rows, length=length)
    lengths = [length] * rows if edges is None else edges.diff().tolist()
    causal = getattr(model.config, "is_causal", True)
    return count_flops(model, rows * length, attention_pairs(lengths, causal=causal))


PEAKS: dict[tuple[str, ...], float] = {
    ("A100",): 312e12,
    ("A800",): 312e12,
    ("H100", "PCIe"): 756e12,
    ("H100", "NVL"): 835e12,
    ("H100",): 989e12,
    ("H800",): 989e12,
    ("H200", "NVL"): 835e12,
    ("H200",): 989e12,
    ("GH200",): 989e12,
    ("B200",): 2250e12,
    ("GB200",): 2500e12,
    ("L40S",): 362e12,
    ("4090",): 165.2e12,
    ("5090",): 209.5e12,
    ("3090",): 71e12,
}
"""Words of a GPU's name, more specific ones first -> dense bfloat16 FLOP/s with float32 sums. From NVIDIA's data sheets
and white papers, without sparsity."""

_OTHER_CHIPS = {"MIG", "Laptop", "D", "Max-Q", "Ti"}  # names with the same number for other chips, or parts of one


def known_peak(name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a GPU by its `torch.cuda.get_device_name()`; None if it is not in `PEAKS`."""
    words = set(name.replace("-", " ").split()) | set(name.split())
    if words & _OTHER_CHIPS:
        return None
    return next((peak for key, peak in PEAKS.items() if words.issuperset(key)), None)


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bfloat16 FLOP/s of a device; None if it is no GPU or not in `PEAKS`."""
    return known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
