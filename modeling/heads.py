"""Models with other heads: masked language model, sequence and token classification, question answering."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import can_return_tuple

from .configuration import LinearLlama3Config
from .inputs import Mask, check_loss
from .loss import check_skip_logits, chunked_loss
from .model import LinearLlama3Model
from .pretrained import LinearLlama3PreTrainedModel


class LinearLlama3ForMaskedLM(LinearLlama3PreTrainedModel):
    """A bidirectional model (`config.is_causal=False`) that predicts masked tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: LinearLlama3Config) -> None:
        super().__init__(config)
        if config.is_causal:
            raise ValueError(
                "a masked language model reads both sides of a token, got config.is_causal=True; set is_causal=False "
                "(and a mixer without a decay), or use LinearLlama3ForCausalLM"
            )
        self.model = LinearLlama3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        if skip_logits:
            check_skip_logits(labels)
        if labels is not None:
            check_loss(kwargs, sharded=self.model.sequence_parallel_context is not None, shifts=False)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,  # also if config.return_dict is False
            **kwargs,
        )
        logits = loss = None
        if skip_logits:
            loss = chunked_loss(self, outputs.last_hidden_state, labels, shift=False, **kwargs)
        else:
            logits = self.lm_head(outputs.last_hidden_state)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


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
