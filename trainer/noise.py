"""NEFTune (arXiv:2310.05914) for ranks that hold a part of every sequence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class EmbeddingNoise:
    """Uniform noise on the embeddings of a sequence of L tokens and D channels, up to alpha / sqrt(L * D).

    transformers' hook would use the length of a rank's part as L: the noise on W ranks would be sqrt(W) too strong, and
    ranks with the same seed would draw the same noise. Here every rank draws its own noise. It has the distribution of
    one process, but not the same values.

    Args:
        alpha: TrainingArguments' `neftune_noise_alpha`.
        process: index of this process among all processes.
    """

    def __init__(self, alpha: float, process: int) -> None:
        self.alpha, self.process = alpha, process
        self.embedding: nn.Module | None = None

    def prepare(self, embedding: nn.Module, length: int) -> None:
        """Set the noise for the next batch, whose complete rows have `length` tokens."""
        self.length = length
        if embedding is not self.embedding:
            self.close()
            self.embedding, self._handle = embedding, embedding.register_forward_hook(self)

    def close(self) -> None:
        """Remove the hook."""
        if self.embedding is not None:
            self._handle.remove()
            self.embedding = None

    def __call__(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        """Add noise to this rank's embeddings `[B, C, D]` in training."""
        if not module.training:
            return embedded
        bound = self.alpha / math.sqrt(self.length * embedded.shape[-1])
        seed = int(torch.randint(2**62, ()))  # from the CPU's generator, which checkpoints restore
        generator = torch.Generator(embedded.device).manual_seed(seed + self.process)
        return embedded + torch.empty_like(embedded).uniform_(-bound, bound, generator=generator)
