"""A tiny checkpoint with a tokenizer of letters and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from linear_llama3 import LinearLlama3ForCausalLM
from tests.helpers.recipes import write_tokenizer
from tests.helpers.tiny import tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}.{{ m.content }}_{% endfor %}"
    "{% if add_generation_prompt %}assistant.{% endif %}"
)


def write_checkpoint(folder: Path, *, template: str | None = TEMPLATE, seed: int = 0) -> None:
    tokenizer = write_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    tiny_model("gla", seed=seed, vocab_size=len(tokenizer), **special).save_pretrained(folder)


def continuation(model: LinearLlama3ForCausalLM, tokenizer: PreTrainedTokenizerBase, inputs: Any, tokens: int) -> str:
    """Return greedily generated text, with a forward pass over the complete text for each token."""
    ids = inputs["input_ids"]
    length = ids.shape[1]
    while ids.shape[1] < length + tokens and (ids.shape[1] == length or ids[0, -1] != tokenizer.eos_token_id):
        ids = ids.new_tensor([[*ids[0].tolist(), int(model(ids, use_cache=False).logits[0, -1].argmax())]])
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True)
