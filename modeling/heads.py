"""Models with other heads: masked language model, sequence and token classification, question answering."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import can_return_tuple

from .inputs import Mask
from .model import LanguageModel
from .pretrained import LinearLlama3PreTrainedModel


class LinearLlama3ForMaskedLM(LanguageModel):
    """A bidirectional model (`config.is_causal=False`) that predicts masked tokens."""

    shifts_labels = False
    _rule = "a masked language model reads both sides of a token"
    _remedy = "set is_causal=False (and a mixer without a decay), or use LinearLlama3ForCausalLM"

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Return logits `[B, T, vocab]`, and the loss if `labels` `[B, T]` are given.

        Args:
            labels: the original token at each masked position, -100 elsewhere.
            skip_logits: return the same loss without logits (`chunked_loss`).
            kwargs: arguments of `LinearLlama3Model.forward` and of the loss; under a sequence-parallel context `labels`
                need `num_items_in_batch`, the number of labels in the complete batch.

        Raises:
            ValueError: arguments contradict each other, or the loss lacks one.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        return MaskedLMOutput(**self._predict(inputs, labels, kwargs, skip_logits=skip_logits)[1])


class LinearLlama3ForSequenceClassification(GenericForSequenceClassification, LinearLlama3PreTrainedModel):
    """Classify sequences by the last token that is not padding."""

    needs_complete_sequences = True
    accepts_loss_kwargs = False  # for Trainer: the loss is a mean that ignores num_items_in_batch


class LinearLlama3ForTokenClassification(GenericForTokenClassification, LinearLlama3PreTrainedModel):
    """Classify tokens."""

    needs_complete_sequences = True
    accepts_loss_kwargs = False  # as above


class LinearLlama3ForQuestionAnswering(GenericForQuestionAnswering, LinearLlama3PreTrainedModel):
    """Find the start and the end of an answer in the sequence."""

    needs_complete_sequences = True
