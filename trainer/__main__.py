"""Trains from a recipe: accelerate launch … -m linear_llama3.trainer RECIPE.yaml [section.key=value …]"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase, default_data_collator, set_seed

from ..modeling import LinearLlama3ForCausalLM
from ..modeling.hub import CARD_NAME
from .data import load_documents, pack_documents
from .recipe import Recipe, load_recipe
from .report import PLOT_NAME, plot_loss, write_model_card
from .trainer import LinearLlama3Trainer


def main(arguments: list[str]) -> None:
    if not arguments:
        raise SystemExit("usage: accelerate launch … -m linear_llama3.trainer RECIPE.yaml [section.key=value …]")
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("linear_llama3").setLevel(logging.INFO)  # what "auto" chose, and why
    try:
        recipe = load_recipe(arguments[0], arguments[1:])
        trainer = build_trainer(recipe)
    except ValueError as error:  # the user's; later ones keep their traceback
        raise SystemExit(f"error: {error}") from error
    describe(trainer, recipe)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        write_report(trainer, recipe)  # before the save, which may upload the folder
    save(trainer)
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        print(f"checkpoint: {folder}\nmodel card: {folder / CARD_NAME}\nplot: {folder / PLOT_NAME}")


def build_trainer(recipe: Recipe) -> LinearLlama3Trainer:
    """Everything that the recipe names, ready to train."""
    args = recipe.training_arguments()
    set_seed(args.seed)
    tokenizer = _load_tokenizer(recipe.tokenizer)
    with args.main_process_first(desc="preparing the data"):  # the others read its cache
        rows = pack_documents(load_documents(recipe.data), tokenizer, recipe.sequence_length)
    trainer = LinearLlama3Trainer(
        model=build_model(recipe, tokenizer),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    if trainer.sequence_parallel_context is not None:
        trainer.sequence_parallel_context.settle(trainer.model)
    return trainer


def describe(trainer: LinearLlama3Trainer, recipe: Recipe) -> None:
    """Says once what is trained on which grid of processes."""
    if not trainer.is_world_process_zero():
        return
    length, context = recipe.sequence_length, trainer.sequence_parallel_context
    print(
        f"{trainer.model.num_parameters() / 1e6:.1f}M parameters, {len(trainer.train_dataset)} rows of {length} tokens"
    )
    if context is None:
        print(f"{trainer.args.world_size} data-parallel processes, whole rows each")
        return
    print(f"{_grid(trainer)}, {-(-length // context.world_size)} tokens of every row each:")
    for first in range(0, trainer.args.world_size, context.world_size):
        print(f"  rows of replica {first // context.world_size}: ranks {first} to {first + context.world_size - 1}")
    print(f"linear layers {context.config.linear}, softmax layers {context.config.softmax}, layout {context.layout}")


def save(trainer: LinearLlama3Trainer) -> None:
    """The whole weights, tokenizer and state, also where FSDP2's checkpoints are sharded (its default)."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:  # sharded, Trainer would leave the weights out
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.save_state()


def write_report(trainer: LinearLlama3Trainer, recipe: Recipe) -> None:
    """Plot and model card beside the weights."""
    folder, state = Path(trainer.args.output_dir), trainer.state
    batch = trainer.get_total_train_batch_size(trainer.args)
    facts = {
        "processes": _grid(trainer),
        "optimizer steps": state.global_step,
        "tokens a step": f"{batch * recipe.sequence_length:,}",
        "tokens": f"{state.num_input_tokens_seen:,}",
        "FLOPs": f"{state.total_flos:.3g}",
    }
    plot_loss(state.log_history, folder / PLOT_NAME)
    write_model_card(folder, trainer.model, recipe, state.log_history, facts)


def _grid(trainer: LinearLlama3Trainer) -> str:
    ranks = 1 if trainer.sequence_parallel_context is None else trainer.sequence_parallel_context.world_size
    return f"{trainer.args.world_size // ranks} data-parallel x {ranks} sequence-parallel processes"


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LinearLlama3ForCausalLM:
    """The recipe's model, from weights or anew with the tokenizer's vocabulary."""
    if (name := recipe.model.get("name_or_path")) is not None:
        try:
            model = LinearLlama3ForCausalLM.from_pretrained(name)
        except OSError as error:
            raise ValueError(
                f"name_or_path must be a folder or a Hub name with weights, got {name!r}: {error}"
            ) from error
    else:
        special = {token: getattr(tokenizer, token) for token in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model = LinearLlama3ForCausalLM(recipe.model_config(vocab_size=len(tokenizer), **special))
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the model must have an embedding for each of the tokenizer's {len(tokenizer)} tokens, got vocab_size = "
            f"{model.config.vocab_size}; use the model's own tokenizer, or leave vocab_size out"
        )
    return model


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
