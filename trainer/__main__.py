"""Training from a recipe: accelerate launch … -m linear_llama3.trainer RECIPE.yaml [section.key=value …]"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, default_data_collator, set_seed

from ..modeling.hub import CARD_NAME
from .arguments import LinearLlama3TrainingArguments
from .checkpoints import manifest
from .checkpoints.manifest import ResumeError
from .command_line import Changes, RecipeFile, run, user_errors
from .data.documents import load_documents
from .data.files import DataError
from .data.packing import collate_documents
from .data.tokenization import describe_missing_stop
from .data.training_rows import training_rows, without_share
from .failures import on_every_rank
from .launched import join_on_cpus
from .parallelism import describe_grid, local_tokens
from .recipes.build import build_model, load_tokenizer
from .recipes.preflight import check_machine
from .recipes.recipe import Recipe, load_recipe
from .recipes.report import PLOT_NAME, plot_loss, write_model_card
from .trainer import LinearLlama3Trainer

logger = logging.getLogger(__name__)


def main(recipe_file: RecipeFile, changes: Changes = None) -> None:
    """Train a recipe in one of the processes of a launch."""
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("linear_llama3").setLevel(logging.INFO)  # shows the choices of "auto" and their reasons
    with user_errors():  # later errors keep their traceback
        join_on_cpus()
        recipe = load_recipe(recipe_file, changes)
        args = recipe.training_arguments()
        finished = on_every_rank(partial(check_machine, recipe.training))[0]
        trainer = build_trainer(recipe, args) if finished is None else None
    if trainer is None:
        if args.process_index == 0:
            print(finished, flush=True)
        return
    describe(trainer, recipe)
    with user_errors((ResumeError, DataError)):  # data that a stream reaches only now
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        write_report(trainer, recipe)  # before the save, which may upload the folder
    save(trainer)
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        print(f"checkpoint: {folder}\nmodel card: {folder / CARD_NAME}\nplot: {folder / PLOT_NAME}")


def build_trainer(recipe: Recipe, args: LinearLlama3TrainingArguments) -> LinearLlama3Trainer:
    """Build the trainer, with everything that the recipe names; ValueError if it asks for something impossible."""
    set_seed(args.seed)
    tokenizer = load_tokenizer(recipe)
    with args.main_process_first(desc="preparing the data"):  # the others read its cache
        rows, validation_rows = make_rows(recipe, tokenizer)
    collator = default_data_collator
    if recipe.data.packing == "none":
        collator = partial(collate_documents, padding=tokenizer.pad_token_id or 0)
    trainer = LinearLlama3Trainer(
        model=build_model(recipe, tokenizer),
        args=args,
        train_dataset=rows,
        eval_dataset=validation_rows,
        processing_class=tokenizer,
        data_collator=collator,
    )
    if trainer.sequence_parallel_context is not None:
        trainer.sequence_parallel_context.resolve_layout(trainer.model)
    if args.overwrite_output_dir and trainer.is_world_process_zero():
        manifest.clear(Path(args.output_dir))
    if recipe.data.format == "chat" and trainer.is_world_process_zero():
        warn_of_missing_stop(trainer, recipe)
    return trainer


def make_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Return the rows to train on, and the rows to validate on (None if the recipe has no section `validation`)."""
    rows, validation = training_rows(recipe.data, tokenizer, recipe.sequence_length), recipe.validation
    if validation is None:
        return rows, None
    if validation.share is not None:
        return without_share(rows, validation.share, recipe.setting("seed"))
    try:
        return rows, training_rows(validation.data(recipe.data), tokenizer, recipe.sequence_length)
    except DataError as error:
        raise DataError(f"validation: {error}") from error


def warn_of_missing_stop(trainer: LinearLlama3Trainer, recipe: Recipe) -> None:
    """Warn if the chat template does not teach the model to stop: the loss of such a run looks healthy."""
    tokenizer, ends = trainer.processing_class, trainer.model.generation_config.eos_token_id
    stops = {ends} if isinstance(ends, int) else set(ends or [])
    ending = describe_missing_stop(next(iter(load_documents(recipe.data))), tokenizer, stops)
    if ending is not None:
        template = recipe.data.chat_template or f"of the tokenizer {recipe.tokenizer}"
        logger.warning(
            "the model may not learn to stop: %s, and generation ends at %s (chat template: %s). Put %s before "
            "{%% endgeneration %%} (in a template without these marks, at the end of an assistant's turn), or set "
            "eos_token_id in the model's generation_config to the token that ends a turn",
            ending,
            tokenizer.convert_ids_to_tokens(sorted(stops)) or "no token",
            template,
            tokenizer.eos_token or "an end-of-sequence token",
        )


def describe(trainer: LinearLlama3Trainer, recipe: Recipe) -> None:
    """Print once the model, the data and the grid of processes."""
    if not trainer.is_world_process_zero():
        return
    length, context, rows = recipe.sequence_length, trainer.sequence_parallel_context, trainer.train_dataset
    total, trained = trainer.model.num_parameters(), trainer.get_num_trainable_parameters()
    parameters = f"{total / 1e6:.1f}M parameters" + (f", {trained / 1e6:.2f}M trained" if trained < total else "")
    number = "a stream of" if isinstance(rows, IterableDataset) else len(rows)
    print(f"{parameters}, {number} rows of {'up to ' if recipe.data.packing == 'none' else ''}{length} tokens")
    print(_grid(trainer, length))
    if context is not None:
        print(
            f"linear layers {context.config.linear}, softmax layers {context.config.softmax}, layout {context.layout}"
        )


def save(trainer: LinearLlama3Trainer) -> None:
    """Save complete weights, tokenizer and state, even if FSDP2's checkpoints are sharded (its default)."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:  # sharded, Trainer would leave the weights out
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.save_state()


def write_report(trainer: LinearLlama3Trainer, recipe: Recipe) -> None:
    """Write plot and model card next to the weights."""
    folder, state = Path(trainer.args.output_dir), trainer.state
    tokens = trainer.get_total_train_batch_size(trainer.args) * recipe.sequence_length
    if trainer.adaptive_groups is not None:
        tokens = state.num_input_tokens_seen // max(state.global_step, 1)
    facts = {
        "processes": _grid(trainer, recipe.sequence_length),
        "optimizer steps": state.global_step,
        "tokens a step": f"{tokens:,}",
        "tokens": f"{state.num_input_tokens_seen:,}",
        "FLOPs": f"{state.total_flos:.3g}",
    }
    model = trainer.model
    if recipe.lora is not None:
        facts["trained"] = f"LoRA adapters, {trainer.get_num_trainable_parameters() / 1e6:.2f}M parameters"
        model = model.get_base_model()
    plot_loss(state.log_history, folder / PLOT_NAME)
    write_model_card(folder, model, recipe, state.log_history, facts)


def _grid(trainer: LinearLlama3Trainer, length: int) -> str:
    processes, context = trainer.args.world_size, trainer.sequence_parallel_context
    if trainer.adaptive_groups is not None:
        degrees = ", ".join(map(str, sorted(trainer.adaptive_groups.costs.by_degree)))
        rows = trainer.get_total_train_batch_size(trainer.args)
        return f"adaptive groups of {degrees} of {processes} processes, planned for every step of {rows} rows"
    ranks, layout = (1, "contiguous") if context is None else (context.world_size, context.layout)
    return describe_grid(processes, ranks, local_tokens(length, ranks, layout))


if __name__ == "__main__":
    run(main)
