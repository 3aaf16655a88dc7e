"""An OpenAI-compatible server for one model: `linear-llama3 serve`, which is `transformers serve` with our class."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from transformers.utils.import_utils import is_serve_available

from ..modeling import LinearLlama3ForCausalLM
from ..modeling.loading import load_config, load_tokenizer_of
from ..modeling.releases import check_hooks
from ..trainer.command_line import user_errors


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name; requests name it as it is here.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the weights: auto (as they are stored), bfloat16, ...")] = "auto",
    log_level: Annotated[str, typer.Option(help="debug, info, warning, error or critical")] = "warning",
) -> None:
    """Serve a model by the OpenAI API: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models.

    The server is that of transformers, without continuous batching, which keeps no state for linear layers: requests
    for a model are answered one after the other.
    """
    with user_errors():
        check_serving(model)
        from transformers.cli.serve import Serve

        register()
        Serve(force_model=model, host=host, port=port, device=device, dtype=dtype, log_level=log_level)


def check_serving(model: str) -> None:
    """ValueError for a model that the server could not load; a warning where it could not chat."""
    if not is_serve_available():
        raise ValueError(
            "serving needs FastAPI, uvicorn and openai, and one of them is not there; install this package with its "
            "extra `serve`: pip install '.[serve]' in its folder"
        )
    architectures = load_config(model).architectures
    if architectures != [LinearLlama3ForCausalLM.__name__]:
        raise ValueError(
            f"serve takes a {LinearLlama3ForCausalLM.__name__}, got {model!r} with architectures={architectures}; "
            "`transformers serve` takes the models of transformers"
        )
    if load_tokenizer_of(model).chat_template is None:
        print(
            f"The tokenizer of {model!r} has no chat template: /v1/chat/completions will fail. /v1/completions works.",
            file=sys.stderr,
        )


def register() -> None:
    """Let the server find our class.

    `transformers serve` looks the class of a checkpoint up as an attribute of the module `transformers`, not in the
    Auto classes, and has no hook for others (5.17 to 5.24: `ModelManager._load_model`). Only this command adds the
    attribute, which replaces nothing.
    """
    from transformers.cli.serving import model_manager

    check_hooks(model_manager.ModelManager, {"_load_model": ("model_id_and_revision",)}, ["architectures"])
    # the module as the server sees it: transformers can be in memory twice, since it loads itself again by its path
    setattr(model_manager.transformers, LinearLlama3ForCausalLM.__name__, LinearLlama3ForCausalLM)
