"""transformers' `text-generation` pipeline: left-padded batches of prompts are continued like each prompt alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import pipeline

from tests.helpers.checkpoint import NEW_TOKENS, QUESTIONS, ROOT, continuations, load, tokenizer

NEVER_IMPORTED = """
import json, sys
from transformers import pipeline
folder, options, questions = sys.argv[1], *map(json.loads, sys.argv[2:])
generator = pipeline("text-generation", model=folder, trust_remote_code=True, device="cpu")
print(json.dumps([texts[0]["generated_text"] for texts in generator(questions, **options)]))
"""
OPTIONS = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "batch_size": len(QUESTIONS), "return_full_text": False}


def test_a_model_object_continues_a_batch_like_each_prompt(checkpoint: Path) -> None:
    generator: Any = pipeline("text-generation", model=load(checkpoint), tokenizer=tokenizer(checkpoint), device="cpu")
    expected = continuations(checkpoint)
    assert [texts[0]["generated_text"] for texts in generator(QUESTIONS, **OPTIONS)] == expected
    alone = [generator(question, **{**OPTIONS, "batch_size": 1}) for question in QUESTIONS]
    assert [texts[0]["generated_text"] for texts in alone] == expected


@pytest.mark.slow
def test_a_folder_with_trusted_remote_code(checkpoint: Path, tmp_path: Path) -> None:
    """A process that has never imported the package finds it through the checkpoint."""
    command = [sys.executable, "-c", NEVER_IMPORTED, str(checkpoint), json.dumps(OPTIONS), json.dumps(QUESTIONS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == continuations(checkpoint)
