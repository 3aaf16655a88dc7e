"""Write text with a model: `linear-llama3 generate` and `linear-llama3 chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from ..modeling.loading import load_model, load_tokenizer_of
from ..trainer.command_line import user_errors

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of a causal language model.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, help="0 takes the likeliest token; by default what the model's generation config says."),
]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Draw from the likeliest tokens that have this probability together."),
]
Seed = Annotated[int | None, typer.Option(help="Of the draws; by default another one each time.")]


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Text to continue; by default standard input.")
    ] = None,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Continue a text, and print what is added while it is written."""
    with user_errors():
        tokenizer = load_tokenizer_of(model)
        inputs = tokenizer(sys.stdin.read() if prompt is None else prompt, return_tensors="pt")
        Writer(model, tokenizer, max_new_tokens, temperature, top_p, seed).write(inputs)


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="A first message, with the role system.")] = None,
    max_new_tokens: Tokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Talk with a model, a line at a time. /reset forgets the conversation, /exit or the end of input ends it."""
    with user_errors():
        tokenizer = load_tokenizer_of(model)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"a conversation needs a chat template, the tokenizer of {model!r} has none; continue text with "
                "generate, or train on conversations with data.chat_template"
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
    """The next line of a person or a pipe; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


class Writer:
    """A model with its tokenizer and the way it chooses tokens.

    Args:
        name: folder or Hub name of the model.
        temperature, top_p: None leaves them to the model's generation config.

    Raises:
        ValueError: there is no such model, or `top_p` without a draw.
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
            raise ValueError(f"top_p limits what is drawn, got --top-p {top_p} with --temperature 0; leave one out")
        self.tokenizer, self.model = tokenizer, load_model(name)
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        if temperature == 0:
            self.options["do_sample"] = False
        elif temperature is not None or top_p is not None:
            self.options |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
            if self.model.generation_config.top_k is None:
                self.options["top_k"] = 0  # transformers' own default of 50 would limit the draw as well
        if seed is not None:
            set_seed(seed)

    def write(self, inputs: Any) -> str:
        """What the model adds to a prompt (`input_ids` and `attention_mask` `[1, T]`), printed while it is written."""
        length = inputs["input_ids"].shape[1]
        if length == 0:
            raise ValueError("the prompt must have at least one token, got none; give a text")
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = self.model.generate(**inputs.to(self.model.device), **self.options, streamer=streamer)
        return self.tokenizer.decode(output[0, length:], skip_special_tokens=True)

    def answer(self, messages: list[dict[str, str]]) -> str:
        """The next message of a conversation, which the model reads again from its beginning."""
        try:
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return self.write(inputs)
