"""`linear-llama3 serve`: transformers' server with our class, tested with `openai`'s client and `transformers chat`."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from linear_llama3 import LinearLlama3Config, LinearLlama3ForCausalLM, LinearLlama3ForMaskedLM, cli
from linear_llama3.commands import serving
from tests.helpers.chat_checkpoint import continuation, write_checkpoint
from tests.helpers.tiny import SIZES

ROOT = Path(__file__).parents[2]
MESSAGES = [{"role": "user", "content": "the quick"}]


class Server:
    """Run the command in its own process, with a listener at the address of the Hub."""

    def __init__(self, folder: Path) -> None:
        self.model = str(folder)
        self.hub = socket.create_server(("127.0.0.1", 0))
        self.hub.setblocking(False)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        hub = f"http://127.0.0.1:{self.hub.getsockname()[1]}"
        self.environment = {
            **os.environ,
            "HF_ENDPOINT": hub,
            "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        line = [sys.executable, "-m", "linear_llama3.cli", "serve", self.model, "--port", str(self.port)]
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [*line, "--device", "cpu", "--dtype", "float32"], env=self.environment, stdout=self.log, stderr=self.log
        )

    def client(self) -> Any:
        import openai

        client = openai.OpenAI(base_url=f"http://localhost:{self.port}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://localhost:{self.port}/health", timeout=5).close()
                return client
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(Path(self.log.name).read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    folder = tmp_path_factory.mktemp("served")
    write_checkpoint(folder, seed=1)
    server = Server(folder)
    yield server
    server.process.terminate()
    server.process.wait(20)


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return server.client()


def expected(server: Server, tokens: int, *, chat: bool, messages: list[dict[str, str]] = MESSAGES) -> str:
    tokenizer = AutoTokenizer.from_pretrained(server.model)
    model = LinearLlama3ForCausalLM.from_pretrained(server.model).eval()
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    prompt = tokenizer("the quick", return_tensors="pt")
    return continuation(
        model, tokenizer, tokenizer.apply_chat_template(messages, **options) if chat else prompt, tokens
    )


def test_a_chat_completion_equals_complete_forwards(server: Server, client: Any) -> None:
    request = {"model": server.model, "messages": MESSAGES, "max_tokens": 10, "temperature": 0}
    answer = client.chat.completions.create(**request)
    text = expected(server, 10, chat=True)
    assert len(text.split()) > 3 and answer.choices[0].message.content == text
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert len(chunks) > 4 and "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_a_completion_equals_complete_forwards(server: Server, client: Any) -> None:
    request = {"model": server.model, "prompt": "the quick", "max_tokens": 12, "temperature": 0}
    text = expected(server, 12, chat=False)
    assert len(text.split()) > 3 and client.completions.create(**request).choices[0].text == text
    chunks = list(client.completions.create(**request, stream=True))
    assert len(chunks) > 4 and "".join(chunk.choices[0].text or "" for chunk in chunks) == text


def test_draws_follow_the_seed(server: Server, client: Any) -> None:
    request = {"model": server.model, "prompt": "the quick", "max_tokens": 12, "temperature": 2.0}
    options = [{"seed": seed, "extra_body": {"generation_config": '{"do_sample": true}'}} for seed in (1, 1, 2)]
    one, same, other = (client.completions.create(**request, **option).choices[0].text for option in options)
    assert one == same != other


def test_another_model_is_refused(server: Server, client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="other/model", prompt="a", max_tokens=1)
    assert "Server is pinned to" in raised.value.response.text


@pytest.mark.slow
def test_transformers_chat_talks_to_the_server(server: Server, client: Any) -> None:
    """Answer `transformers chat` with a prompt, and "no" when it asks whether to continue an answer of 10 tokens."""
    line = ["from transformers.cli.transformers import app; app()", "chat", server.model]
    done = subprocess.run(
        [sys.executable, "-c", *line, f"http://localhost:{server.port}", "max_new_tokens=10", "do_sample=False"],
        env={**server.environment, "HF_ENDPOINT": "http://127.0.0.1:9"},  # the client's own requests do not count
        input="the quick\nn\n!exit\n",
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    plain = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout).split())
    assert expected(server, 10, chat=True) in plain, plain


def test_nothing_was_looked_up_on_the_hub(server: Server, client: Any) -> None:
    with pytest.raises(BlockingIOError):
        print(server.hub.accept()[0].recv(1000))


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_options_and_model_class_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our class is an attribute of `transformers` only after the command has run. Continuous batching stays off."""
    serve = pytest.importorskip("transformers.cli.serve")
    transformers = pytest.importorskip("transformers.cli.serving.model_manager").transformers
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(serve, "Serve", lambda **options: given.append(options))
    monkeypatch.setattr(serving, "is_serve_available", lambda: True)
    name = "LinearLlama3ForCausalLM"
    write_checkpoint(tmp_path / "chatty")
    write_checkpoint(tmp_path / "bare", template=None)
    assert not hasattr(transformers, name)
    try:
        done = run("serve", tmp_path / "chatty", "--port", 8123)
        assert done.exit_code == 0, done.exception
        assert getattr(transformers, name) is LinearLlama3ForCausalLM and "chat template" not in done.stderr
        assert "has no chat template: /v1/chat/completions will fail" in run("serve", tmp_path / "bare").stderr
    finally:
        delattr(transformers, name)
    assert given[0] == {
        "force_model": str(tmp_path / "chatty"), "host": "localhost", "port": 8123, "device": "auto",
        "dtype": "auto", "log_level": "warning",
    }  # fmt: skip
    assert run("serve", tmp_path / "chatty", "--continuous-batching").exit_code == 2


def test_other_models_and_missing_packages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LinearLlama3ForMaskedLM(LinearLlama3Config(**SIZES, is_causal=False)).save_pretrained(tmp_path)
    monkeypatch.setattr(serving, "is_serve_available", lambda: True)
    masked = str(run("serve", tmp_path).exception)
    assert masked.startswith("error: serve takes a LinearLlama3ForCausalLM, got ")
    assert "architectures=['LinearLlama3ForMaskedLM']" in masked
    assert "error: the model must be a folder or a Hub name" in str(run("serve", "none").exception)
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    assert "install this package with its extra `serve`" in str(run("serve", tmp_path).exception)
