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
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name. Requests must use the same name.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda:0, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: auto (as stored), bfloat16, ...")] = "auto",
    log_level: Annotated[str, typer.Option(help="Log level: debug, info, warning, error or critical.")] = "warning",
) -> None:
    """Serve a model over the OpenAI API: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models.

    The server is transformers' own, without continuous batching, which keeps no state for linear layers. Requests are
    answered one at a time.
    """
    with user_errors():
        check_serving(model)
        from transformers.cli.serve import Serve

        register()
        Serve(force_model=model, host=host, port=port, device=device, dtype=dtype, log_level=log_level)


def check_serving(model: str) -> None:
    """Check that the server can load a model; warn if it cannot chat.

    Raises:
        ValueError: a package is missing, or the model is not a LinearLlama3ForCausalLM.
    """
    if not is_serve_available():
        raise ValueError(
            "serving needs FastAPI, uvicorn and openai, but not all are installed; install this package with its extra "
            "`serve`: run pip install '.[serve]' in a checkout of its source"
        )
    architectures = load_config(model).architectures
    if architectures != [LinearLlama3ForCausalLM.__name__]:
        raise ValueError(
            f"serve takes a {LinearLlama3ForCausalLM.__name__}, got {model!r} with architectures={architectures}; "
            "use `transformers serve` for the models of transformers"
        )
    if load_tokenizer_of(model).chat_template is None:
        print(
            f"The tokenizer of {model!r} has no chat template: /v1/chat/completions will fail. /v1/completions works.",
            file=sys.stderr,
        )


def register() -> None:
    """Make our class known to the server.

    `transformers serve` looks up the class of a checkpoint as an attribute of the module `transformers`, not in the
    Auto classes, and has no hook for other classes (5.17 to 5.24: `ModelManager._load_model`). Only this command adds
    the attribute, which does not replace an existing one.
    """
    from transformers.cli.serving import model_manager

    check_hooks(model_manager.ModelManager, {"_load_model": ("model_id_and_revision",)}, ["architectures"])
    # the server's own reference: transformers can be in memory twice, since it loads itself a second time by path
    setattr(model_manager.transformers, LinearLlama3ForCausalLM.__name__, LinearLlama3ForCausalLM)
