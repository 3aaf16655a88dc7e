"""Output of a run: speed in the log, one bar, curves, a card with recipe and command."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import TrainerControl, TrainerState, TrainingArguments

from linear_llama3.modeling.flops import batch_flops
from linear_llama3.trainer import LinearLlama3Trainer, LinearLlama3TrainingArguments, progress
from linear_llama3.trainer.progress import ThroughputCallback, summary
from linear_llama3.trainer.recipes.recipe import load_recipe
from linear_llama3.trainer.recipes.report import launch_command, plot_loss, recipe_text, speed, write_model_card
from tests.helpers.ranks import run_distributed
from tests.helpers.recipes import recipe_with
from tests.helpers.training import arguments, reset_accelerate, rows, tiny_model


def test_speed_without_evaluations_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock: 4 s for two steps, 30 s of a save and 20 s of an evaluation; then a second entry of 1 s."""
    times = iter([100.0, 103.0, 133.0, 153.0, 154.0, 154.0, 155.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(progress, "peak_flops", lambda device: 1e12)
    args = TrainingArguments(str(tmp_path), use_cpu=True, include_num_input_tokens_seen="all")
    control = TrainerControl()
    state, meter = TrainerState(num_input_tokens_seen=1000, total_flos=5e12), ThroughputCallback()
    meter.on_train_begin(args, state, control)  # at 100, after a resume
    meter.on_step_end(args, state, control)  # 103
    meter.on_save(args, state, control)  # 133
    meter.on_evaluate(args, state, control)  # 153
    meter.on_step_end(args, state, control)  # 154
    state.num_input_tokens_seen, state.total_flos = 1400, 7e12
    assert meter.read(args, state) == {"tokens_per_second": 100.0, "tflops_per_device": 0.5, "mfu": 0.5}  # 154
    state.num_input_tokens_seen, state.total_flos = 1450, 7.1e12
    assert meter.read(args, state) == {"tokens_per_second": 50.0, "tflops_per_device": 0.1, "mfu": 0.1}  # 155


def train_with_a_bar(folder: str) -> tuple[str, str, list[dict[str, Any]], float]:
    """Return the terminal output and the log of one of two ranks, and the FLOPs of all batches."""
    reset_accelerate()
    args = LinearLlama3TrainingArguments(**arguments(folder, 1, disable_tqdm=False))
    error, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(out):
        trainer = LinearLlama3Trainer(model=tiny_model(), args=args, train_dataset=rows(True))
        trainer.train()
    reset_accelerate()
    complete = sum(batch_flops(tiny_model(), {k: v[None] for k, v in row.items()}).training for row in rows(True))
    return error.getvalue(), out.getvalue(), trainer.state.log_history, complete


def test_one_bar_and_a_log_for_trackers(tmp_path: Path) -> None:
    (bar, lines, history, flops), (other_bar, other_lines, *_) = run_distributed(train_with_a_bar, 2, str(tmp_path))
    assert "2/2" in bar and "tokens/s" in bar and f"loss {history[0]['loss']:.4f}" in bar and "GiB" in bar
    assert "MFU" not in bar, "nothing is known of a CPU's peak"
    assert "tokens_per_second" in lines, "in a file, where no bar can be read"
    assert other_bar == other_lines == ""
    entries = [entry for entry in history if "loss" in entry]
    assert len(entries) == 2 and all("mfu" not in entry and entry["peak_memory_gib"] > 0 for entry in entries)
    for entry in entries:
        per_token = entry["tflops_per_device"] * 1e12 / (entry["tokens_per_second"] / 2)
        assert per_token == pytest.approx(flops / (8 * 13), rel=0.05), "documents differ a little from step to step"
    assert history[-1]["total_flos"] == pytest.approx(flops, rel=1e-6)


def test_a_line_in_the_bar() -> None:
    logs = {"loss": 2.5, "tokens_per_second": 12345.6, "mfu": 0.4123, "peak_memory_gib": 61.25, "epoch": 1}
    assert summary(logs) == "loss 2.5000, 12,346 tokens/s, MFU 41.2%, 61.2 GiB"


HISTORY = [
    {"loss": 3.0, "grad_norm": 1.0, "tokens_per_second": 10.0, "tflops_per_device": 0.1, "mfu": 0.01, "step": 1},
    {"loss": 2.0, "grad_norm": 0.5, "tokens_per_second": 90.0, "tflops_per_device": 0.9, "mfu": 0.09, "step": 2},
    {"eval_loss": 2.2, "step": 2},
    {"loss": 1.0, "grad_norm": 0.4, "tokens_per_second": 80.0, "tflops_per_device": 0.8, "mfu": 0.08, "step": 3},
]


def test_speeds_are_medians() -> None:
    assert speed(HISTORY) == {
        "tokens a second": "80",
        "TFLOP/s of the model, per device": "0.8",
        "MFU": "8.0% of the bfloat16 peak",
    }
    assert speed([{"loss": 1.0, "step": 1}])["MFU"].startswith("unknown")


def test_the_plot_shows_all_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    plot_loss(HISTORY, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    loss, norm, tokens = figures[0].axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[3.0, 2.0, 1.0], [2.2]]
    assert [line.get_ydata().tolist() for line in norm.lines] == [[1.0, 0.5, 0.4]]
    assert [line.get_ydata().tolist() for line in tokens.lines] == [[10.0, 90.0, 80.0]]
    plot_loss([], tmp_path / "empty.png")


def test_the_card_can_be_run_again(tmp_path: Path) -> None:
    """The recipe in the card is the recipe with the launch's changes, without secrets; a user's file stays."""
    data = {"dataset": "json", "arguments": {"data_files": "x.jsonl", "token": "hf_secret"}}
    path = recipe_with(tmp_path, data=data)
    path.write_text(path.read_text().replace("max_steps: 2", "max_steps: 2\n  hub_token: hf_secret"))
    recipe = load_recipe(path, ["training.learning_rate=1e-5", "sequence_parallel.softmax=ring"])
    out = tmp_path / "out"
    out.mkdir()
    write_model_card(out, tiny_model(), recipe, HISTORY, {"tokens": "18"})
    card = ModelCard.load(out / "README.md").text
    again = load_recipe(out / "recipe.yaml")
    assert "hf_secret" not in card
    assert again.training == {k: v for k, v in recipe.training.items() if k != "hub_token"}
    assert again.data.arguments == {"data_files": "x.jsonl"}
    assert (again.model, again.sequence_parallel) == (recipe.model, recipe.sequence_parallel)
    assert "`python -m linear_llama3.trainer recipe.yaml`" in card
    for fact in ("| tokens | 18 |", "| tokens a second | 80 |", "| MFU | 8.0%", "1 x CPU ", "3.0000, 1.0000"):
        assert fact in card, fact
    (out / "recipe.yaml").write_text("mine: true")
    write_model_card(out, tiny_model(), recipe, HISTORY, {})
    assert (out / "recipe.yaml").read_text() == "mine: true"


def test_the_card_names_no_path_of_this_machine(tmp_path: Path) -> None:
    """Absolute paths become names, in the recipe too; recipe.yaml, from which the run can be repeated, keeps them."""
    data = {"files": [f"{tmp_path}/corpus/*.jsonl", "near/corpus", "~/more"], "arguments": {"a": [f"{tmp_path}/b"]}}
    recipe = load_recipe(recipe_with(tmp_path, data=data))
    write_model_card(tmp_path, tiny_model(), recipe, HISTORY, {})
    card = (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in card and "~/" not in card
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path.name}")' in card
    assert "| data | *.jsonl, near/corpus, more |" in card
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert shown["data"]["files"] == ["*.jsonl", "near/corpus", "more"] and shown["data"]["arguments"] == {"a": ["b"]}
    assert shown["tokenizer"] == "tokenizer" and shown["training"] == recipe.training | {"output_dir": "out"}
    assert load_recipe(tmp_path / "recipe.yaml") == recipe

    (tmp_path / "stored").mkdir()
    for dataset, names in ((f"{tmp_path}/stored", None), ("someone/stored", ["someone/stored"])):
        write_model_card(tmp_path, tiny_model(), load_recipe(recipe_with(tmp_path, data={"dataset": dataset})), [], {})
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.datasets == names and str(tmp_path) not in str(card)


def test_a_recipe_survives_its_text(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_with(tmp_path, data={"files": ["a", "b"]}), ["training.learning_rate=1e-5"])
    (tmp_path / "again.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({"HOME": "/", "ACCELERATE_MIXED_PRECISION": "no"}, "python"),
        ({"ACCELERATE_CONFIG_FILE": "/home/me/fsdp.yaml"}, "ACCELERATE_CONFIG_FILE=fsdp.yaml python"),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, "torchrun --nproc_per_node 8"),
        (
            {
                "WORLD_SIZE": "16",
                "LOCAL_WORLD_SIZE": "8",
                "PARALLELISM_CONFIG_CP_SIZE": "4",
                "FSDP_VERSION": "2",
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_OFFLOAD_PARAMS": "false",
                "ACCELERATE_DYNAMO_BACKEND": "no",
            },
            "ACCELERATE_USE_FSDP=true FSDP_OFFLOAD_PARAMS=false FSDP_VERSION=2 PARALLELISM_CONFIG_CP_SIZE=4 "
            "torchrun --nproc_per_node 8 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint $FIRST_NODE:29500",
        ),
    ],
)
def test_the_command_that_started_a_run(environment: dict[str, str], command: str) -> None:
    assert launch_command(environment) == f"{command} -m linear_llama3.trainer recipe.yaml"
