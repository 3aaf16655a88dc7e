"""From documents to tokens and labels: plain text, conversations, prompts with completions."""

from __future__ import annotations

import json
import re
import reprlib
from bisect import bisect_left
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ...ops.cross_entropy import IGNORE_INDEX
from .files import DocumentError

Messages = list[dict[str, Any]]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Learnt(NamedTuple):
    """A document and the spans (first character, character behind the last) that a model learns to write."""

    text: str
    spans: list[tuple[int, int]]


def tokenize(
    batch: dict[str, list[Any]], indices: list[int], *, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[list[int]]]:
    """`input_ids`, and `labels` where not every token is a target, of a batch of documents (`load_documents`).

    Text and completions are closed by the end-of-sequence token, conversations by their template.

    Args:
        indices: of the documents in the data.

    Raises:
        DocumentError: a ValueError; a document that is not what its column says.
    """
    if "text" in batch:
        return {"input_ids": _tokenize_texts(batch["text"], indices, tokenizer)}
    tokens: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for index, *values in zip(indices, *batch.values(), strict=True):
        try:
            ids, labels = _tokenize_example(dict(zip(batch, values, strict=True)), tokenizer)
        except (ValueError, TypeError, KeyError, IndexError, TemplateError) as error:
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise DocumentError(index, text) from error
        tokens["input_ids"].append(ids)
        tokens["labels"].append(labels)
    return tokens


def _tokenize_texts(texts: list[Any], indices: list[int], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    for index, text in zip(indices, texts, strict=True):
        if not isinstance(text, str):
            raise DocumentError(index, f"a document must be text, got {text!r}; correct it or take it out")
        try:
            _check_unicode(text)
        except ValueError as error:
            raise DocumentError(index, str(error)) from error
    ids = tokenizer(texts, verbose=False)["input_ids"]
    return [_closed(document, tokenizer) if text else [] for document, text in zip(ids, texts, strict=True)]


def _check_unicode(text: str) -> None:
    """Raise ValueError for a lone surrogate, which JSON can hold as an escape but a tokenizer cannot read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text must be valid Unicode, got the lone surrogate {text[error.start]!a} at character {error.start}; "
            "correct it or take it out, or set data.arguments.encoding_errors: replace"
        ) from error


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _tokenize_example(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if "messages" in example:
        learnt = _conversation(example["messages"], 0, example.get("tools"), tokenizer)
    elif isinstance(example["prompt"], str) and isinstance(example["completion"], str):
        prompt, text = example["prompt"], example["prompt"] + example["completion"]
        learnt = Learnt(text, [(len(prompt), len(text))])
        ids, labels = _labels(learnt, tokenizer, add_special_tokens=True)
        if tokenizer.eos_token_id is None:
            return ids, labels
        ids = _closed(ids, tokenizer)
        return ids, [*labels[: len(ids) - 1], ids[-1]]
    else:
        messages = [*example["prompt"], *example["completion"]]
        learnt = _conversation(messages, len(example["prompt"]), example.get("tools"), tokenizer)
    return _labels(learnt, tokenizer, add_special_tokens=False)


def _labels(learnt: Learnt, tokenizer: PreTrainedTokenizerBase, **options: Any) -> tuple[list[int], list[int]]:
    """A token is a target if one of its characters is in a span."""
    if not tokenizer.is_fast:
        raise ValueError(f"labels need a fast tokenizer, which knows its tokens' characters, got {type(tokenizer)}")
    _check_unicode(learnt.text)
    encoded = tokenizer(learnt.text, return_offsets_mapping=True, verbose=False, **options)
    starts, stops = [start for start, _ in learnt.spans], [stop for _, stop in learnt.spans]
    labels = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        first = min(start + 1, end)  # of spaces, some tokenizers give only the end
        span = bisect_left(stops, first)  # the first that does not end before the token
        labels.append(token if span < len(stops) and starts[span] < end else IGNORE_INDEX)
    if all(label == IGNORE_INDEX for label in labels):
        raise ValueError("there must be an assistant's turn or a completion to learn, got none; take it out")
    return encoded["input_ids"], labels


def _conversation(messages: Messages, prompt: int, tools: Any, tokenizer: PreTrainedTokenizerBase) -> Learnt:
    """The assistant's turns, but for those among the first `prompt` messages.

    They are what the chat template puts between `{% generation %}` and `{% endgeneration %}`. In a template without
    these, a turn is what the conversation up to and with it adds to the prompt that asks for it.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "conversations need a chat template, the tokenizer has none; name a file in data.chat_template"
        )
    messages = _without_none(messages or [])
    if not messages or not all("role" in m and ("content" in m or "tool_calls" in m) for m in messages):
        raise ValueError(
            f"messages must each have a role and a content or tool calls, got {reprlib.repr(messages)}; mend them"
        )
    tools = json.loads(tools) if isinstance(tools, str) else tools
    template = tokenizer.get_chat_template(tools=tools)

    def render(messages: Messages, **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    if GENERATION.search(template):
        texts, spans = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        learnt = Learnt(texts[0], [tuple(span) for span in spans[0]])
    else:
        learnt = _turns(messages, render)
    if not prompt:
        return learnt
    asked = render(messages[:prompt])
    if not learnt.text.startswith(asked):
        raise ValueError(_rewritten(prompt - 1))
    return Learnt(learnt.text, [span for span in learnt.spans if span[0] >= len(asked)])


def unlearnt_stop(document: dict[str, Any], tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> str | None:
    """Describe how the learnt part of a turn or completion ends, if it does not end in a token of `stops`.

    Conversations are judged by their template alone, with two exchanges: some templates end a turn only if another
    message follows, or only if none does.

    Args:
        stops: ids of the tokens at which generation ends.

    Returns:
        The description; None if the model learns to stop, or if the template refuses these exchanges.
    """
    ends = tuple(tokenizer.convert_ids_to_tokens(sorted(stops)))
    if "messages" not in document and isinstance(document["completion"], str):
        end = tokenizer.eos_token
        return None if end in ends else f"a completion ends in the tokenizer's eos_token, {end!r}"
    ask, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    try:
        learnt = _conversation([ask, answer, ask, answer], 0, None, tokenizer)
    except (ValueError, TypeError, KeyError, IndexError, TemplateError):  # reported for the user's own documents
        return None
    for start, stop in learnt.spans:
        turn = learnt.text[start:stop].rstrip()  # a newline may follow
        if not turn.endswith(ends):
            return f"the learnt part of a turn ends in {turn[-20:]!r}"
    return None


def _without_none(value: Any) -> Any:
    """Arrow gives every struct of a column all keys that one of them has."""
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _turns(messages: Messages, render: Any) -> Learnt:
    text, spans = render(messages), []
    if messages[0]["role"] == "assistant":
        raise ValueError("a conversation must begin with another's message, got the assistant's; take it out")
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(messages[:index], add_generation_prompt=True)
        answered = render(messages[: index + 1])
        if not (text.startswith(answered) and answered.startswith(asked)):
            raise ValueError(_rewritten(index))
        spans.append((len(asked), len(answered)))
    return Learnt(text, spans)


def _rewritten(index: int) -> str:
    return (
        f"the chat template must leave earlier messages as they are when others follow, got other text up to message "
        f"{index}; mark the assistant's turns in it by {{% generation %}} and {{% endgeneration %}}"
    )
