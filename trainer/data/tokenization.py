"""Tokens and labels of documents: plain text, conversations, prompts with completions."""

from __future__ import annotations

import json
import re
import reprlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ...ops.cross_entropy import IGNORE_INDEX
from .files import DataError

Messages = list[dict[str, Any]]
Spans = list[tuple[int, int]]  # (first character, character after the last) of texts whose tokens are targets
BATCH = 100  # documents of text that are tokenized together
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def tokenize(
    documents: Iterable[tuple[str, dict[str, Any]]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, list[int]]]:
    """Yield the tokens of documents: `input_ids`, and `labels` unless all tokens are targets.

    Text and completions are closed by the end-of-sequence token, conversations by their template.

    Args:
        documents: the place of each document, for messages, and its columns as in `load_documents`.

    Raises:
        DataError: a ValueError; a document does not fit its column.
    """
    documents = iter(documents)
    while batch := list(islice(documents, BATCH)):
        texts = []
        for place, document in batch:
            try:
                if "text" in document:
                    texts.append(_checked(document["text"]))
                else:
                    ids, labels = _tokenize_example(document, tokenizer)
                    yield {"input_ids": ids, "labels": labels}
            except (ValueError, TypeError, KeyError, IndexError, TemplateError) as error:
                text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                raise DataError(f"{place}: {text}") from error
        if texts:
            for text, ids in zip(texts, tokenizer(texts, verbose=False)["input_ids"], strict=True):
                yield {"input_ids": _closed(ids, tokenizer) if text else []}


def _checked(text: Any) -> str:
    """Return the text; raise ValueError for another type, and for a lone surrogate.

    JSON can hold a lone surrogate as an escape, but a tokenizer cannot read it.
    """
    if not isinstance(text, str):
        raise ValueError(f"a document must be text, got {text!r}; correct it or take it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text must be valid Unicode, got the lone surrogate {text[error.start]!a} at character {error.start}; "
            "correct it or take it out, or set data.arguments.encoding_errors: replace"
        ) from error
    return text


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _tokenize_example(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if "messages" in example:
        text, spans = _conversation(example["messages"], 0, example.get("tools"), tokenizer)
    elif isinstance(prompt := example["prompt"], str) and isinstance(example["completion"], str):
        text = prompt + example["completion"]
        ids, labels = _labels(text, [(len(prompt), len(text))], tokenizer, add_special_tokens=True)
        if tokenizer.eos_token_id is None:
            return ids, labels
        ids = _closed(ids, tokenizer)
        return ids, [*labels[: len(ids) - 1], ids[-1]]
    elif not (isinstance(prompt, list) and isinstance(example["completion"], list)):
        raise ValueError(
            "prompt and completion must both be text or both lists of messages, got "
            f"{reprlib.repr(prompt)} and {reprlib.repr(example['completion'])}; correct them"
        )
    else:
        text, spans = _conversation([*prompt, *example["completion"]], len(prompt), example.get("tools"), tokenizer)
    return _labels(text, spans, tokenizer, add_special_tokens=False)


def _labels(
    text: str, spans: Spans, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    """Return ids and labels. A token is a target if one of its characters is in a span.

    transformers' `return_assistant_tokens_mask` agrees since 5.24. Earlier releases drop every turn that begins with a
    space if the tokenizer's offsets leave spaces out, as those of byte-level tokenizers do by default.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"labels need a fast tokenizer, which knows its tokens' characters, got {type(tokenizer)}")
    options = {"add_special_tokens": add_special_tokens, "return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer(_checked(text), **options)
    starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
    labels = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        first = min(start + 1, end)  # some tokenizers give only the end of spaces
        span = bisect_left(stops, first)  # the first span that does not end before the token
        labels.append(token if span < len(stops) and starts[span] < end else IGNORE_INDEX)
    if all(label == IGNORE_INDEX for label in labels):
        raise ValueError("a document must have an assistant's turn or a completion to learn, got none; take it out")
    return encoded["input_ids"], labels


def _conversation(messages: Messages, prompt: int, tools: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Spans]:
    """Return the text of a conversation, with the assistant's turns after the first `prompt` messages as its spans.

    A turn is what the chat template puts between `{% generation %}` and `{% endgeneration %}`. In a template without
    these marks, a turn is what the conversation up to and including it adds to the prompt that asks for it.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "conversations need a chat template, the tokenizer has none; name a file in data.chat_template"
        )
    messages = _without_none(messages or [])
    if not messages or not all("role" in m and ("content" in m or "tool_calls" in m) for m in messages):
        raise ValueError(
            f"messages must each have a role and a content or tool calls, got {reprlib.repr(messages)}; correct them"
        )
    tools = json.loads(tools) if isinstance(tools, str) else tools
    template = tokenizer.get_chat_template(tools=tools)

    def render(messages: Messages, **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    if GENERATION.search(template):
        options = {"tools": tools, "chat_template": template, "return_assistant_tokens_mask": True}
        (text,), (spans,) = render_jinja_template([messages], **options, **tokenizer.special_tokens_map)
    else:
        text, spans = _turns(messages, render)
    if prompt:
        asked = render(messages[:prompt])
        if not text.startswith(asked):
            raise ValueError(_rewritten(prompt - 1))
        spans = [span for span in spans if span[0] >= len(asked)]
    return text, spans


def _without_none(value: Any) -> Any:
    """Remove keys with the value None: Arrow gives every struct of a column all keys that one of them has."""
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _turns(messages: Messages, render: Callable[..., str]) -> tuple[str, Spans]:
    text = render(messages)
    spans: Spans = []
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
    return text, spans


def _rewritten(index: int) -> str:
    return (
        f"the chat template must leave earlier messages as they are when others follow, got other text up to message "
        f"{index}; mark the assistant's turns in it by {{% generation %}} and {{% endgeneration %}}"
    )


def describe_missing_stop(document: dict[str, Any], tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> str | None:
    """Describe the end of the labeled part of a turn or completion, if it does not end in a token of `stops`.

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
        text, spans = _conversation([ask, answer, ask, answer], 0, None, tokenizer)
    except (ValueError, TypeError, KeyError, IndexError, TemplateError):  # reported for the user's own documents
        return None
    turns = (text[start:stop].rstrip() for start, stop in spans)  # a newline may follow the end token
    unended = next((turn for turn in turns if not turn.endswith(ends)), None)
    return None if unended is None else f"the labeled part of a turn ends in {unended[-20:]!r}"
