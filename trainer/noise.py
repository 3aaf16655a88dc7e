"""NEFTune (arXiv:2310.05914) where a rank holds a part of every sequence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class EmbeddingNoise:
    """Uniform noise on the embeddings of a sequence of L tokens and D channels, up to alpha / sqrt(L * D).

    transformers' hook would take the length of a rank's part for L, so that noise on W ranks were sqrt(W) too strong,
    and ranks with the same seed would draw the same noise. Here every rank draws its own: of the same distribution as
    on one process, but not the same numbers.

    Args:
        alpha: TrainingArguments' `neftune_noise_alpha`.
        process: this process's index among all.
    """

    def __init__(self, alpha: float, process: int) -> None:
        self.alpha, self.process = alpha, process
        self.embedding: nn.Module | None = None

    def prepare(self, embedding: nn.Module, length: int) -> None:
        """For the next batch, whose complete rows have `length` tokens."""
        self.length = length
        if embedding is not self.embedding:
            self.remove()
            self.embedding, self._handle = embedding, embedding.register_forward_hook(self)

    def remove(self) -> None:
        if self.embedding is not None:
            self._handle.remove()
            self.embedding = None

    def __call__(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        """`[B, C, D]`, this rank's tokens, with noise in training."""
        if not module.training:
            return embedded
        bound = self.alpha / math.sqrt(self.length * embedded.shape[-1])
        seed = int(torch.randint(2**62, ()))  # of the CPU's generator, which checkpoints restore
        generator = torch.Generator(embedded.device).manual_seed(seed + self.process)
        return embedded + torch.empty_like(embedded).uniform_(-bound, bound, generator=generator)
