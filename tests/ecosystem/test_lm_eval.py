"""lm-evaluation-harness on a local task: likelihoods and continuations equal those of every row alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tests.helpers.checkpoint import NEW_TOKENS, QUESTIONS, ROOT, continuations, load, tokenizer

CHOICES = [" x", " x + 1 if x else None", " self"]  # of unlike lengths, so that a batch is padded on the right


def write_tasks(folder: Path) -> None:
    lines = [json.dumps({"question": q, "choices": CHOICES, "answer": i}) for i, q in enumerate(QUESTIONS)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    choose = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    write: dict[str, Any] = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"max_gen_toks": NEW_TOKENS, "until": ["<|end|>"], "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, task in {"choose": choose, "write": write}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))


def likelihoods(checkpoint: Path) -> list[list[float]]:
    """Return the log-probability of every choice after every question, each row alone."""
    model, words, table = load(checkpoint), tokenizer(checkpoint), []
    for question in QUESTIONS:
        start, table_row = len(words(question)["input_ids"]), []
        for choice in CHOICES:
            ids = words(question + choice, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores = model(ids).logits[0].log_softmax(-1)
            table_row.append(sum(scores[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])))
        table.append(table_row)
    return table


def check(samples: dict[str, list[dict[str, Any]]], checkpoint: Path) -> None:
    scores = [[float(choice[0]) for choice in sample["filtered_resps"]] for sample in samples["choose"]]
    assert scores == [pytest.approx(row, rel=1e-5) for row in likelihoods(checkpoint)]
    assert [sample["filtered_resps"][0] for sample in samples["write"]] == continuations(checkpoint)


def test_a_model_object_is_evaluated_as_every_row_alone(checkpoint: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=load(checkpoint), tokenizer=tokenizer(checkpoint), batch_size=4),
        tasks=["choose", "write"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    check(results["samples"], checkpoint)
    best = [max(range(len(CHOICES)), key=row.__getitem__) for row in likelihoods(checkpoint)]
    accuracy = sum(choice == answer for answer, choice in enumerate(best)) / len(QUESTIONS)
    assert results["results"]["choose"]["acc,none"] == pytest.approx(accuracy)


@pytest.mark.slow
def test_the_command_line_with_trusted_remote_code(checkpoint: Path, tmp_path: Path) -> None:
    """A process that has never imported the package finds it through the checkpoint."""
    write_tasks(tmp_path)
    model = ["--model", "hf", "--model_args", f"pretrained={checkpoint},trust_remote_code=True,dtype=float32"]
    tasks = ["--include_path", str(tmp_path), "--tasks", "choose,write", "--batch_size", "4", "--device", "cpu"]
    output = ["--log_samples", "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "lm_eval", *model, *tasks, *output]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    files = {task: next((tmp_path / "out").rglob(f"samples_{task}_*.jsonl")) for task in ("choose", "write")}
    samples = {task: [json.loads(line) for line in path.read_text().splitlines()] for task, path in files.items()}
    check({task: sorted(rows, key=lambda row: row["doc_id"]) for task, rows in samples.items()}, checkpoint)
