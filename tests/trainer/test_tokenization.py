"""Documents as tokens and targets, against what a hand writes down and against transformers' own masks."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from linear_llama3.trainer.data.files import DataError
from linear_llama3.trainer.data.tokenization import describe_missing_stop, tokenize
from tests.helpers.recipes import write_tokenizer

ROOT = Path(__file__).parents[2]
CHAT = (ROOT / "scripts/recipes/chat.jinja").read_text()
UNMARKED = CHAT.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
LLAMA = (  # the shape of Llama 3's: headers, trimmed content, an end of turn
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<' + message['role'] + '>\n\n' + message['content'] | trim + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>\n\n' }}{% endif %}"
)
FORGETFUL = (  # leaves out what was said before the last message
    "{% for message in messages %}{% if loop.last %}{{ message.content }}{% else %}~{% endif %}{% endfor %}"
)
TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": " no "},
]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """One token per letter, "_" ends a document."""
    return write_tokenizer(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A byte-level BPE, whose tokens are of several letters."""
    folder = tmp_path_factory.mktemp("pairs")
    runpy.run_path(str(ROOT / "scripts/quickstart_data.py"))["train_tokenizer"]([ROOT / "LICENSE"], folder)
    return AutoTokenizer.from_pretrained(folder)


def one(tokenizer: PreTrainedTokenizerBase, **example: Any) -> tuple[list[int], list[int]]:
    (tokens,) = tokenize([("a.jsonl, line 1", example)], tokenizer)
    return tokens["input_ids"], tokens["labels"]


def spelled(tokenizer: PreTrainedTokenizerBase, text: str, targets: str) -> tuple[list[int], list[int]]:
    """Ids of `text`, and labels where `targets` has no blank under it."""
    assert len(text) == len(targets)
    known = tokenizer.get_vocab()
    ids = [known.get(letter, known["."]) for letter in text]
    return ids, [i if mark != " " else -100 for i, mark in zip(ids, targets, strict=True)]


def test_texts_end_with_the_end_token(letters: PreTrainedTokenizerBase) -> None:
    documents = tokenize((("", {"text": text}) for text in ("ab", "", "c_")), letters)
    spelled = [letters.convert_ids_to_tokens(document["input_ids"]) for document in documents]
    assert spelled == [["a", "b", "_"], [], ["c", "_"]]


def test_the_assistants_turns_are_learnt(letters: PreTrainedTokenizerBase) -> None:
    """A dot is any letter that the tokenizer does not know."""
    letters.chat_template = CHAT
    text = ".ystem..be.kind..ser..a.b..ssistant..yes_..ser..c..ssistant...no._."
    mark = "                                     yes_                    .no._ "
    assert one(letters, messages=TURNS) == spelled(letters, text, mark)


def test_a_template_without_marks(letters: PreTrainedTokenizerBase) -> None:
    """Targets are what a turn adds to the prompt that asks for it, with the end of the line."""
    letters.chat_template = UNMARKED
    text = ".ystem..be.kind..ser..a.b..ssistant..yes_..ser..c..ssistant...no._."
    mark = "                                     yes_.                   .no._."
    assert one(letters, messages=TURNS) == spelled(letters, text, mark)
    letters.chat_template = LLAMA
    turns = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": " yo "}]
    assert letters.bos_token is None
    assert one(letters, messages=turns) == spelled(letters, ".user...hi.end..assistant...yo.end.", " " * 28 + "yo.end.")


def test_prompts_and_completions(letters: PreTrainedTokenizerBase) -> None:
    assert one(letters, prompt="ab", completion="cd") == spelled(letters, "abcd_", "  cd_")
    assert one(letters, prompt="ab", completion="c_") == spelled(letters, "abc_", "  c_")
    letters.chat_template = CHAT
    text = ".ystem..be.kind..ser..a.b..ssistant..yes_..ser..c..ssistant...no._."
    mark = "                                                             .no._ "
    assert one(letters, prompt=TURNS[:3], completion=TURNS[3:]) == spelled(letters, text, mark)


@pytest.mark.parametrize("trim", [True, False], ids=["trimmed offsets", "offsets"])
def test_the_masks_of_transformers(trim: bool, pairs: PreTrainedTokenizerBase) -> None:
    from tokenizers.processors import ByteLevel

    pairs.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trim)
    pairs.chat_template = CHAT
    text = "You may add Your own   copyright statement"
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": f"  {text}\n\n   and more  "},
        {"role": "assistant", "content": "Licensor"},
        {"role": "user", "content": text[:10]},
        {"role": "assistant", "content": text},
    ]
    ids, labels = one(pairs, messages=messages)
    _, spaces = one(pairs, prompt="may", completion=" add  ")
    assert pairs.decode([i for i in spaces if i != -100]) == " add  <|end|>"
    pairs.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)  # which transformers' own masks need
    expected = pairs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == expected["input_ids"] and len(ids) < sum(len(m["content"]) for m in messages)
    assert [label != -100 for label in labels] == [bool(mask) for mask in expected["assistant_masks"]]
    assert {label for label, i in zip(labels, ids, strict=True) if label != i} == {-100}


def test_a_token_over_the_edge_is_learnt(pairs: PreTrainedTokenizerBase) -> None:
    """ "You" is one token, whether what is learnt begins or ends inside it."""
    _, labels = one(pairs, prompt="may Yo", completion="u add")
    assert pairs.decode([i for i in labels if i != -100]) == " You add<|end|>"
    pairs.chat_template = "{% generation %}{{ messages[0].content }}{% endgeneration %}u may"
    _, labels = one(pairs, messages=[{"role": "assistant", "content": "add Yo"}])
    assert pairs.decode([i for i in labels if i != -100]) == "add You"


def test_tools_and_absent_keys(letters: PreTrainedTokenizerBase) -> None:
    """Arrow gives every message the keys of all; a template must not see them."""
    letters.chat_template = (
        "{{ tools | length if tools else 'x' }}{% for m in messages %}{% generation %}"
        "{{ m.content }}{{ m.keys() | list | length }}{{ m.tool_calls | tojson if m.tool_calls else '' }}"
        "{% endgeneration %}{% endfor %}"
    )
    call = [{"name": "f", "arguments": {"a": "b", "c": None}}]
    messages = [{"role": "assistant", "content": "q", "tool_calls": call, "name": None}]
    ids, _ = one(letters, messages=messages, tools=json.dumps([{"name": "f"}]))
    expected = '1q3[{"name": "f", "arguments": {"a": "b"}}]'
    assert ids == spelled(letters, expected, " " * len(expected))[0]


def test_the_recipes_template_learns_a_turn_that_only_calls_a_tool(letters: PreTrainedTokenizerBase) -> None:
    letters.chat_template = CHAT
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{"a": "b"}]}]
    ids, labels = one(letters, messages=messages)
    answer = '[{"a": "b"}]_'
    text = f"User:\nq\nAssistant:\n{answer}\n"
    mark = " " * text.index(answer) + answer.replace(" ", ".") + " "
    assert (ids, labels) == spelled(letters, text, mark)


@pytest.mark.parametrize(
    ("template", "example", "message"),
    [
        (None, {"messages": TURNS}, "need a chat template, the tokenizer has none; name a file in data.chat_template"),
        (CHAT, {"messages": TURNS[:2]}, "an assistant's turn or a completion to learn, got none"),
        (CHAT, {"messages": []}, r"must each have a role and a content or tool calls, got \[\]"),
        (CHAT, {"messages": [{"content": "a"}]}, "must each have a role"),
        (CHAT, {"messages": None}, "must each have a role and a content or tool calls, got"),
        (CHAT, {"messages": [{"role": "assistant", "content": None}]}, "must each have a role and a content or tool"),
        ("{{ messages[0].name + '' }}", {"messages": TURNS}, "UndefinedError: .*name"),
        (CHAT, {"prompt": "a", "completion": ""}, "got none"),
        (CHAT, {"prompt": None, "completion": "b"}, "must both be text or both lists of messages, got None and 'b'"),
        (CHAT, {"prompt": "a", "completion": 5}, "must both be text or both lists of messages, got 'a' and 5"),
        (UNMARKED, {"messages": TURNS[2:]}, "must begin with another's message, got the assistant's"),
        (FORGETFUL, {"messages": TURNS}, "leave earlier messages as they are .* up to message 2; mark the assistant's"),
        ("{{ raise_exception('roles') }}", {"messages": TURNS}, "TemplateError: roles"),
    ],
)
def test_documents_that_are_refused(
    template: str | None, example: dict[str, Any], message: str, letters: PreTrainedTokenizerBase
) -> None:
    letters.chat_template = template
    with pytest.raises(DataError, match=rf"^a\.jsonl, line 7: .*({message})"):
        list(tokenize([("a.jsonl, line 7", example)], letters))


def test_texts_that_are_refused(letters: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"^second: a document must be text, got None"):
        list(tokenize([("first", {"text": "a"}), ("second", {"text": None})], letters))


def marked(end: str) -> str:
    """Return a template that ends an assistant's turn in this way."""
    answer = f"{{% generation %}}{{{{ m.content }}}}{end}"
    return f"{{% for m in messages %}}{{% if m.role == 'user' %}}u{{% else %}}{answer}{{% endif %}}{{% endfor %}}"


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        (CHAT, None),
        (UNMARKED, None),
        (marked("{{ eos_token }}{% endgeneration %}"), None),
        (marked("{% endgeneration %}{{ eos_token }}"), "answer"),
        (marked("{{ eos_token if loop.last }}{% endgeneration %}"), "answer"),
        (marked("{{ eos_token if not loop.last }}{% endgeneration %}"), "answer"),
        (UNMARKED.replace(" + eos_token", ""), "answer"),
        ("{{ raise_exception('roles') }}", None),
    ],
)
def test_whether_the_end_of_a_turn_is_learnt(
    template: str, ending: str | None, letters: PreTrainedTokenizerBase
) -> None:
    letters.chat_template = template
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for document in ({"messages": turns}, {"prompt": turns[:1], "completion": turns[1:], "tools": None}):
        found = describe_missing_stop(document, letters, {letters.eos_token_id})
        assert (found is None) == (ending is None) and (ending is None or f"ends in '{ending}'" in str(found))
    assert describe_missing_stop({"prompt": "a", "completion": "b"}, letters, {letters.eos_token_id}) is None


@pytest.mark.parametrize("stops", [{5}, set()], ids=["another", "none"])
def test_an_end_at_which_generation_does_not_stop(stops: set[int], letters: PreTrainedTokenizerBase) -> None:
    """The end of a turn is learnt, but generation ends at another token, or at none."""
    letters.chat_template = CHAT
    assert str(describe_missing_stop({"messages": TURNS}, letters, stops)).endswith("ends in 'answer_'")
    assert str(describe_missing_stop({"prompt": "a", "completion": "b"}, letters, stops)).endswith("eos_token, '_'")
