"""Long prompts of purely linear models: the same text for every chunk size, with states of constant size."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.generation import MODELS, feed, generate
from tests.helpers.marks import slow_unless
from tests.helpers.tiny import MIXER_NAMES, tiny_model
from tests.helpers.tiny import tokens as prompt

ROOT = Path(__file__).resolve().parents[2]
TOKENS = [5000, 100_000]


@slow_unless(lambda tokens, mixer: tokens < 10_000 and mixer in ("gla", "rebased"), tokens=TOKENS, mixer=MIXER_NAMES)
def test_states_and_logits_do_not_depend_on_chunks_of_the_prompt(tokens: int, mixer: str) -> None:
    model = tiny_model(mixer, full_attention_interval=0, num_hidden_layers=2, max_position_embeddings=2**17)
    sizes, logits = [], []
    for length, chunk in ((tokens // 100, None), (tokens, None), (tokens, tokens // 25)):
        x = prompt(1, length)
        out = generate(
            model, x, prefill_chunk_size=chunk, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
        )
        assert out.sequences.shape == (1, length + 4)
        sizes.append([layer.recurrent_states[0].nbytes for layer in out.past_key_values.layers])
        logits.append(torch.cat(out.logits))
    assert sizes[0] == sizes[1] == sizes[2] == [4 * math.prod(model.config.linear_state_shape)] * 2  # float32
    torch.testing.assert_close(logits[1], logits[2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("mixer", "interval"), MODELS)
@torch.no_grad()
def test_states_of_linear_layers_do_not_grow(mixer: str, interval: int) -> None:
    model = tiny_model(mixer, full_attention_interval=interval)
    sizes = []
    for pieces in ([10], [500, 1, 499]):
        _, cache = feed(model, prompt(2, sum(pieces)), pieces)
        sizes.append([cache.layers[index].recurrent_states[0].nbytes for index in model.config.linear_layers])
    assert sizes[0] == sizes[1]


PEAKS = """
from pathlib import Path
from tests.helpers.generation import generate
from tests.helpers.tiny import tiny_model, tokens

def peak():  # MiB
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024

model = tiny_model("gla", full_attention_interval=0, num_hidden_layers=2)
generate(model, tokens(1, 5000), prefill_chunk_size=2048)  # what the first call costs
peaks = [peak()]
for chunk in (2048, None):
    generate(model, tokens(1, 100_000), prefill_chunk_size=chunk)
    peaks.append(peak())
print(peaks[1] - peaks[0], peaks[2] - peaks[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux")
def test_chunked_prefill_bounds_the_memory() -> None:
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    chunked, unchunked = map(float, done.stdout.split())
    assert chunked < 20, f"{chunked} MiB"
    assert unchunked > 3 * chunked, f"{unchunked} MiB without chunks, {chunked} with"  # the measurement sees memory
