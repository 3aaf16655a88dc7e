"""Trains from a recipe: accelerate launch … -m linear_llama3.trainer RECIPE.yaml"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase, default_data_collator, set_seed

from ..modeling import LinearLlama3Config, LinearLlama3ForCausalLM
from .data import load_documents, pack_documents
from .recipe import Recipe, load_recipe
from .report import CARD_NAME, PLOT_NAME, plot_loss, write_model_card
from .trainer import LinearLlama3Trainer


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: accelerate launch … -m linear_llama3.trainer RECIPE.yaml")
    try:
        recipe = load_recipe(arguments[0])
        train(recipe)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def train(recipe: Recipe) -> None:
    """Trains, saves weights, tokenizer, plot and card into the recipe's `output_dir`."""
    args = recipe.training_arguments()
    set_seed(args.seed)
    tokenizer = _load_tokenizer(recipe.tokenizer)
    with args.main_process_first(desc="preparing the data"):  # the others read its cache
        rows = pack_documents(load_documents(recipe.data), tokenizer, recipe.sequence_length)
    model = build_model(recipe, tokenizer)
    trainer = LinearLlama3Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    context, lead = trainer.sequence_parallel_context, trainer.is_world_process_zero()
    ranks = 1 if context is None else context.world_size
    grid = f"{args.world_size // ranks} data-parallel x {ranks} sequence-parallel processes"
    if lead:
        print(f"{model.num_parameters() / 1e6:.1f}M parameters, {len(rows)} rows of {recipe.sequence_length} tokens")
        print(f"{grid}: {recipe.sequence_length // ranks} tokens of every row each")
        if context is not None:
            print(f"linear layers: {context.config.linear}, softmax layers: {context.config.softmax}, {context.layout}")
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    if lead:
        folder, history = Path(args.output_dir), trainer.state.log_history
        plot_loss(history, folder / PLOT_NAME)
        facts = {
            "processes": grid,
            "optimizer steps": trainer.state.global_step,
            "tokens": f"{trainer.state.num_input_tokens_seen:,}",
        }
        write_model_card(folder, model, recipe, history, facts)
        print(f"checkpoint: {folder}\nmodel card: {folder / CARD_NAME}\nplot: {folder / PLOT_NAME}")


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LinearLlama3ForCausalLM:
    """The recipe's model, from weights or anew with the tokenizer's vocabulary."""
    if "name_or_path" in recipe.model:
        return LinearLlama3ForCausalLM.from_pretrained(recipe.model["name_or_path"])
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = {"vocab_size": len(tokenizer), "max_position_embeddings": recipe.sequence_length, **special}
    return LinearLlama3ForCausalLM(LinearLlama3Config(**(fields | recipe.model)))


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer must be a folder or a Hub name with a tokenizer, got {name!r}: {error}") from error


def leave() -> None:
    """Ends a process of several: after an orderly goodbye gloo may still abort at interpreter exit."""
    if not dist.is_initialized():
        return
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
    leave()
