"""Generate text with a model: `linear-llama3 generate` and `linear-llama3 chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from ..modeling.loading import load_model, load_tokenizer_of
from ..trainer.command_line import user_errors

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of a causal language model.")]
Tokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, help="0 always takes the most likely token. Default: the model's generation config."),
]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Sample from the most likely tokens whose probabilities add up to this value."),
]
Seed = Annotated[int | None, typer.Option(help="Seed for sampling. Default: a different one in each run.")]


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Text to continue. Default: standard input.")
    ] = None,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Continue a text and print the new tokens as they are generated."""
    with user_errors():
        tokenizer = load_tokenizer_of(model)
        inputs = tokenizer(sys.stdin.read() if prompt is None else prompt, return_tensors="pt")
        Writer(model, tokenizer, max_new_tokens, temperature, top_p, seed).write(inputs)


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message at the start of the conversation.")] = None,
    max_new_tokens: Tokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Chat with a model, one line at a time. /reset starts a new conversation; /exit or the end of input ends it."""
    with user_errors():
        tokenizer = load_tokenizer_of(model)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"chat needs a chat template, but the tokenizer of {model!r} has none; continue text with "
                "`linear-llama3 generate`, or train on conversations with data.chat_template"
            )
        writer = Writer(model, tokenizer, max_new_tokens, temperature, top_p, seed)
        beginning = [] if system is None else [{"role": "system", "content": system}]
        messages = list(beginning)
        while (line := _line()) not in (None, "/exit"):
            if line == "/reset":
                messages = list(beginning)
            elif line:
                messages.append({"role": "user", "content": line})
                messages.append({"role": "assistant", "content": writer.answer(messages)})


def _line() -> str | None:
    """Read the next line from the terminal or a pipe; return None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


class Writer:
    """A model with its tokenizer and its sampling options.

    Args:
        name: folder or Hub name of the model.
        temperature, top_p: None keeps the values of the model's generation config.

    Raises:
        ValueError: there is no such model, or `top_p` is given with a temperature of 0.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        temperature: float | None,
        top_p: float | None,
        seed: int | None,
    ) -> None:
        if temperature == 0 and top_p is not None:
            raise ValueError(
                f"--top-p applies to sampling only, got --top-p {top_p} with --temperature 0; leave one of them out"
            )
        self.tokenizer, self.model = tokenizer, load_model(name)
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        if temperature == 0:
            self.options["do_sample"] = False
        elif temperature is not None or top_p is not None:
            self.options |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
            if self.model.generation_config.top_k is None:
                self.options["top_k"] = 0  # transformers' own default of 50 would limit sampling as well
        if seed is not None:
            set_seed(seed)

    def write(self, inputs: Any) -> str:
        """Print the continuation of a prompt (`input_ids`, `attention_mask` `[1, T]`) as it is generated; return it."""
        length = inputs["input_ids"].shape[1]
        if length == 0:
            raise ValueError("the prompt must have at least one token, got none; give a text")
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = self.model.generate(**inputs.to(self.model.device), **self.options, streamer=streamer)
        return self.tokenizer.decode(output[0, length:], skip_special_tokens=True)

    def answer(self, messages: list[dict[str, str]]) -> str:
        """Return the model's next message; the model reads the conversation from its beginning each time."""
        try:
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return self.write(inputs)
