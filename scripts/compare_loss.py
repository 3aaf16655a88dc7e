"""Print the loss and gradient norm of a recipe's new model on its first row, on the processes of the launch.

    python scripts/compare_loss.py RECIPE.yaml [section.key=value ...]
    accelerate launch ... scripts/compare_loss.py RECIPE.yaml [section.key=value ...]

A launch on several processes also prints the difference to the last run on one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import default_data_collator, set_seed

from linear_llama3.trainer import SequenceParallelAccelerator
from linear_llama3.trainer.command_line import leave
from linear_llama3.trainer.data.training_rows import training_rows
from linear_llama3.trainer.launched import join_on_cpus
from linear_llama3.trainer.recipes.build import build_model, load_tokenizer
from linear_llama3.trainer.recipes.recipe import load_recipe


def main() -> None:
    recipe = load_recipe(sys.argv[1], sys.argv[2:])
    join_on_cpus()
    accelerator = SequenceParallelAccelerator(
        cpu=bool(recipe.training.get("use_cpu")), sequence_parallel_config=recipe.sequence_parallel.config()
    )
    tokenizer = load_tokenizer(recipe)
    with accelerator.main_process_first():
        rows = training_rows(recipe.data, tokenizer, recipe.sequence_length)
    set_seed(0)
    loader = torch.utils.data.DataLoader(rows.with_format("torch").select(range(1)), collate_fn=default_data_collator)
    model, loader = accelerator.prepare(build_model(recipe, tokenizer), loader)
    for batch in loader:
        local = accelerator.shard_batch(batch)
        loss = model(**local, num_items_in_batch=accelerator.num_items(batch)).loss
        accelerator.backward(loss)
        norm = float(accelerator.clip_grad_norm_(model.parameters(), torch.inf))
        result = {"loss": float(accelerator.reduce(loss.detach(), "mean")), "gradient norm": norm}
    if accelerator.is_main_process:
        report(accelerator.num_processes, local["input_ids"].shape[1], result, Path(recipe.training["output_dir"]))


def report(processes: int, tokens: int, result: dict[str, float], folder: Path) -> None:
    values = ", ".join(f"{name} {value:.7f}" for name, value in result.items())
    print(f"{processes} process(es), {tokens} tokens each: {values}")
    memory = folder.parent / "one_process.json"
    if processes == 1:
        memory.write_text(json.dumps(result))
    elif memory.is_file():
        one = json.loads(memory.read_text())
        print("difference: " + ", ".join(f"{name} {result[name] - one[name]:+.1e}" for name in result))


if __name__ == "__main__":
    main()
    leave()
