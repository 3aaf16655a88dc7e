"""`linear-llama3 generate` and `chat`: greedy text on standard output equals that of complete forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from linear_llama3 import LinearLlama3ForCausalLM, cli
from tests.helpers.chat_checkpoint import continuation, write_checkpoint

Loaded = tuple[Path, LinearLlama3ForCausalLM, Any]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, seed=1)
    return folder, LinearLlama3ForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def run(*arguments: Any, stdin: str | None = None) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)


@pytest.mark.parametrize("piped", [False, True])
def test_greedy_text_is_that_of_complete_forwards(piped: bool, loaded: Loaded) -> None:
    folder, model, tokenizer = loaded
    expected = continuation(model, tokenizer, tokenizer("the quick", return_tensors="pt"), 12)
    prompt = [] if piped else ["the quick"]
    done = run("generate", folder, *prompt, "--max-new-tokens", 12, stdin="the quick" if piped else None)
    assert done.exit_code == 0 and len(expected.split()) > 3
    assert done.stdout == expected + "\n"


def test_draws_follow_the_seed_and_top_p(loaded: Loaded) -> None:
    def text(*options: Any) -> str:
        done = run("generate", loaded[0], "the quick", "--max-new-tokens", 20, *options)
        assert done.exit_code == 0, done.output
        return done.stdout

    one, same, other = (text("--temperature", 2, "--seed", seed) for seed in (3, 3, 4))
    assert one == same != other
    greedy = text("--temperature", 0)
    assert text("--temperature", 2, "--top-p", 0.001, "--seed", 3) == greedy != one


def test_a_temperature_draws_from_all_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' default of top_k = 50 would exclude tokens; a checkpoint's own top_k is kept."""
    write_checkpoint(tmp_path)
    given: list[dict[str, Any]] = []

    def generate(self: LinearLlama3ForCausalLM, **options: Any) -> list[list[list[int]]]:
        given.append(options)
        return [[[]]]

    monkeypatch.setattr(LinearLlama3ForCausalLM, "generate", generate)
    run("generate", tmp_path, "a", "--temperature", 1.5)
    config = tmp_path / "generation_config.json"
    config.write_text(config.read_text().replace("{", '{"top_k": 7, "do_sample": true, ', 1))
    run("generate", tmp_path, "a", "--temperature", 1.5)
    run("generate", tmp_path, "a")
    assert given[0]["top_k"] == 0 and given[0]["do_sample"] and given[0]["temperature"] == 1.5
    assert "top_k" not in given[1] and given[1]["do_sample"]
    assert "do_sample" not in given[2] and given[2]["max_new_tokens"] == 128


def test_a_conversation_keeps_its_history_until_a_reset(loaded: Loaded) -> None:
    folder, model, tokenizer = loaded

    def answer(*history: str) -> str:
        roles = ["system", "user", "assistant"] + 2 * ["user", "assistant"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, history, strict=False)]
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        return continuation(model, tokenizer, tokenizer.apply_chat_template(messages, **options), 6)

    first = answer("be kind", "hello")
    second = answer("be kind", "hello", first, "again")
    again = answer("be kind", "again")
    assert first and second != again
    lines = "hello\n\nagain\n/reset\nagain\n/exit\nnever read\n"
    done = run("chat", folder, "--system", "be kind", "--max-new-tokens", 6, stdin=lines)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [first, second, again]
    assert run("chat", folder, "--max-new-tokens", 6, stdin="").stdout == ""  # the end of input


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["generate", "none", "a"], None, "error: the model must be a folder or a Hub name with a config, got 'none'"),
        (["generate", "{folder}", ""], None, "error: the prompt must have at least one token, got none; give a text"),
        (["generate", "{folder}"], "", "error: the prompt must have at least one token"),
        (["generate", "{folder}", "a", "--temperature", "0", "--top-p", "0.5"], None, "got --top-p 0.5 with --temp"),
        (["chat", "{folder}/bare"], "hello\n", "error: chat needs a chat template, but the tokenizer of "),
        (["chat", "{folder}/strict"], "hello\n", "error: the chat template refuses the conversation: no system"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(arguments: list[str], stdin: str | None, message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write_checkpoint(tmp_path / "bare", template=None)
    write_checkpoint(tmp_path / "strict", template="{{ raise_exception('no system') }}")
    done = run(*(argument.format(folder=tmp_path) for argument in arguments), stdin=stdin)
    assert isinstance(done.exception, SystemExit) and message in str(done.exception)
    assert "\n" not in str(done.exception)


@pytest.mark.parametrize("option", ["--max-new-tokens=0", "--temperature=-1", "--top-p=1.5", "--seed=x"])
def test_values_out_of_range_are_refused(option: str, loaded: Loaded) -> None:
    assert run("generate", loaded[0], "a", option).exit_code == 2
