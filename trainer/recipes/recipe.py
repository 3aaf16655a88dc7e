"""A recipe: the YAML file that describes model, data and training of a run.

model: {linear_attention_type: gla, num_hidden_layers: 4, hidden_size: 256}
                                             # or {preset: linear-llama3-1b-gla-hybrid-1-4}, or {name_or_path: folder}
tokenizer: runs/tokenizer
data: {files: corpus/}                       # files, folders, patterns; or {dataset: name, split: train}
validation: {share: 0.01}                    # of the rows, or {files: other/}, or {dataset: name, split: validation}
sequence_length: 8192
sequence_parallel: {size: auto, linear: lasp2, softmax: lasp2h, layout: auto}  # or {size: adaptive, profile: FILE.json}
lora: {r: 16, lora_alpha: 32}                # train adapters instead of all weights: any field of PEFT's LoraConfig
processes: auto                              # for `linear-llama3 train`: one per GPU, or one on a CPU
training: {output_dir: runs/out, max_steps: 100, learning_rate: 1e-3}         # any TrainingArguments field

A launch can change values of the file: `RECIPE.yaml sequence_parallel.softmax=ring training.max_steps=10`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError

from ...modeling import LinearLlama3Config
from ...sequence_parallel import SequenceParallelConfig
from ..arguments import LinearLlama3TrainingArguments
from .values import check_section, field_types, read_yaml

if TYPE_CHECKING:
    from peft import LoraConfig

LOADED_MODEL: dict[str, Any] = {
    "name_or_path": str,
    "dtype": Literal["float32", "bfloat16", "float16"],
    "rope_parameters": dict,
}
"""Keys of the section `model` with `name_or_path`, and their types. `dtype` is the dtype of the weights in memory; by
default float32, or the saved dtype under `lora`, which keeps the weights as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecipe:
    """Documents, either local `files` or a `dataset` of the `datasets` library, and the way they become rows.

    - `files`: names of files, folders or patterns: JSON lines (.jsonl, .ndjson, .json), Parquet (.parquet) or text
      (all others, one document per file). The name of an existing file or folder is never a pattern; hidden
      files must be named.
    - `dataset`: name on the Hub or a folder.
    - `split`: split of the dataset.
    - `arguments`: with `dataset`, arguments of `datasets.load_dataset`: name, revision, data_files, columns, ...; with
      `files`, `encoding`, `encoding_errors` and, for text, `sample_by` ("document", "paragraph", "line").
    - `format`: "text" reads the column `text_column` and adds the tokenizer's special tokens. "chat" reads `messages`
      through the chat template, with a loss on the assistant's turns, or `prompt` and `completion` (strings or
      messages), with a loss on the completion.
    - `text_column`: column of the text, for `format: text`.
    - `chat_template`: file with a Jinja template that replaces the tokenizer's, for `format: chat`.
    - `streaming`: read, tokenize and pack documents during training, without storing rows.
    - `packing`: "wrapped" concatenates documents and cuts at the end of a row, "best_fit" fills rows with complete
      documents, "none" makes every document a row. Attention never crosses the boundary of a document.
    - `long_documents`: tokens of a document beyond `sequence_length`: "continue" makes them a separate document, "cut"
      drops them.
    """

    files: str | list[str] | None = None
    dataset: str | None = None
    split: str = "train"
    arguments: dict[str, Any] = field(default_factory=dict)
    format: Literal["text", "chat"] = "text"
    text_column: str = "text"
    chat_template: str | None = None
    streaming: bool = False
    packing: Literal["wrapped", "best_fit", "none"] = "wrapped"
    long_documents: Literal["continue", "cut"] = "continue"


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationRecipe:
    """Rows for the validation loss during training, read and packed like `data`.

    `training.eval_strategy` and `training.eval_steps` set when it is computed; default after every tenth of the run.

    - `share`: share of the rows of `data` (0 to 1) that is held out, drawn with `training.seed`.
    - `files`: files of other documents, as in `data`.
    - `dataset`: another dataset, as in `data`.
    - `split`: split of the dataset.
    - `arguments`: arguments as in `data`; default those of `data`.
    """

    share: float | None = None
    files: str | list[str] | None = None
    dataset: str | None = None
    split: str = "validation"
    arguments: dict[str, Any] | None = None

    def data(self, data: DataRecipe) -> DataRecipe:
        """Return the data recipe of the validation documents; there is none for a `share`."""
        arguments = data.arguments if self.arguments is None else self.arguments
        own: dict[str, Any] = {"files": self.files, "dataset": self.dataset, "split": self.split}
        return dataclasses.replace(data, streaming=False, arguments=arguments, **own)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceParallelRecipe:
    """Degree, strategies and layout of sequence parallelism.

    - `size`: number of processes that share every sequence; "auto" uses all processes of the launch, "adaptive" plans
      groups for every step of `training.per_device_train_batch_size` documents per process (`data.packing: none`).
    - `profile`: profile for `size: adaptive`, a name or a JSON file.
    - `linear`: strategy of linear layers: lasp1, lasp2, all_scan, all_to_all, auto.
    - `softmax`: strategy of softmax layers: lasp2h, ring, token_ring, rsa, ulysses, auto.
    - `layout`: tokens of each rank: contiguous, zigzag, auto.
    """

    size: int | str = "auto"
    profile: str | None = None
    linear: str = "lasp2"
    softmax: str = "lasp2h"
    layout: str = "auto"

    def config(self) -> SequenceParallelConfig:
        return SequenceParallelConfig(linear=self.linear, softmax=self.softmax, layout=self.layout)


PARALLEL_ARGUMENTS = {
    "size": "sequence_parallel_size",
    "profile": "planner_profile",
    "linear": "linear_strategy",
    "softmax": "softmax_strategy",
    "layout": "sequence_layout",
}
"""Key of the section `sequence_parallel` -> its name in TrainingArguments, which the section `training` lacks."""

SECTIONS = {"data": DataRecipe, "validation": ValidationRecipe, "sequence_parallel": SequenceParallelRecipe}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Description of a complete run.

    - `model`: fields of LinearLlama3Config, on top of a `preset` if one is named; or `name_or_path` of weights to start
      from, with the keys of `LOADED_MODEL`.
    - `tokenizer`: folder or Hub name of the tokenizer.
    - `data`: documents to train on.
    - `sequence_length`: T, tokens of a row.
    - `training`: fields of TrainingArguments, except those of the section `sequence_parallel`.
    - `validation`: rows for the validation loss; none by default.
    - `sequence_parallel`: degree, strategies and layout.
    - `lora`: fields of PEFT's LoraConfig, to train adapters instead of all weights.
    - `processes`: number of processes that `linear-llama3 train` starts; "auto" is one per GPU, or one on a CPU. Other
      launchers set their own number.
    """

    model: dict[str, Any]
    tokenizer: str
    data: DataRecipe
    sequence_length: int
    training: dict[str, Any]
    validation: ValidationRecipe | None = None
    sequence_parallel: SequenceParallelRecipe = field(default_factory=SequenceParallelRecipe)
    lora: dict[str, Any] | None = None
    processes: int | str = "auto"

    def model_config(self, **facts: Any) -> LinearLlama3Config:
        """Return the config of a new model.

        Args:
            facts: fields known from the tokenizer. They override a preset's fields, and the recipe's fields override
                them.
        """
        fields = {"max_position_embeddings": self.sequence_length, **facts, **self.model}
        preset = fields.pop("preset", None)
        if preset is None:
            return LinearLlama3Config(**fields)
        if "max_position_embeddings" not in self.model:  # rotary scaling needs the preset's
            longest = LinearLlama3Config.from_preset(preset).max_position_embeddings
            fields["max_position_embeddings"] = max(longest, self.sequence_length)
        return LinearLlama3Config.from_preset(preset, **fields)

    def lora_config(self) -> LoraConfig:
        """Return the section `lora` as PEFT's config; by default all linear layers except the head have adapters."""
        assert self.lora is not None
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ValueError(
                'lora needs PEFT, which is not installed; in the checkout run `pip install -e ".[lora]"`'
            ) from error
        check_section(self.lora, field_types(LoraConfig), "lora")
        try:
            return LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **self.lora})
        except (TypeError, ValueError) as error:
            raise ValueError(f"lora in the recipe does not make a LoraConfig: {error}") from error

    def training_arguments(self) -> LinearLlama3TrainingArguments:
        """Return the section `training` with the choices of `sequence_parallel`."""
        parallel = {name: getattr(self.sequence_parallel, key) for key, name in PARALLEL_ARGUMENTS.items()}
        validation = dict[str, Any]()
        if self.validation is not None:
            rows = self.setting("per_device_train_batch_size")
            validation = {"eval_strategy": "steps", "per_device_eval_batch_size": rows}
            if "eval_strategy" not in self.training:
                validation["eval_steps"] = 0.1
        return LinearLlama3TrainingArguments(**parallel, **(validation | self.training))

    def setting(self, name: str) -> Any:
        """Return a value of the section `training`, or its default in TrainingArguments."""
        return self.training.get(name, getattr(LinearLlama3TrainingArguments, name))


def load_recipe(path: str | Path, changes: Sequence[str] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        changes: "key=value" or "section.key=value", values that replace those of the file.

    Raises:
        ValueError: a missing file, invalid YAML, an unknown or missing key, or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        wrong = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"a recipe must be a YAML file, got {str(path)!r}, which {wrong}")
    try:
        content = read_yaml(path.read_text(encoding="utf-8-sig"))
    except yaml.YAMLError as error:
        raise ValueError(f"a recipe must be YAML, {path} is not: {' '.join(str(error).split())}") from error
    for change in changes or ():
        _apply(change, content)
    check_section(content, field_types(Recipe), f"recipe {path}", sections=True)
    required = [f.name for f in dataclasses.fields(Recipe) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in content]:
        raise ValueError(
            f"recipe {path} needs {', '.join(missing)}, got only {', '.join(sorted(content)) or 'nothing'}"
        )
    for name, kind in SECTIONS.items():
        if content.get(name) is not None:
            check_section(content[name], field_types(kind), name)
            content[name] = kind(**content[name])
    recipe = Recipe(**content)
    _check_values(recipe)
    return recipe


def _apply(change: str, content: Any) -> None:
    keys, equals, value = change.partition("=")
    *sections, key = keys.split(".")
    for section in sections:
        content = content.setdefault(section, {}) if isinstance(content, dict) else None
    if not equals or not isinstance(content, dict):
        raise ValueError(f"a change must read section.key=value and name a section of the recipe, got {change!r}")
    try:
        content[key] = read_yaml(value)
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"a change's value must be YAML, {change!r} is not: {text}; quote it as one word") from error


def _check_values(recipe: Recipe) -> None:
    types = field_types(LinearLlama3TrainingArguments)
    for name in (*PARALLEL_ARGUMENTS.values(), "parallelism_config"):
        del types[name]
    types["fsdp"] |= bool  # transformers 5.23 warns of strings
    check_section(recipe.training, types, "training")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if (count := recipe.training.get(name, 1)) < 1:
            raise ValueError(f"training.{name} must be at least 1, got {count}; correct it or leave it out")
    if recipe.training.get("deepspeed") is not None:
        raise ValueError("DeepSpeed is not supported, got training.deepspeed; use fsdp, or leave it out")
    if recipe.sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2 (a token and the next), got {recipe.sequence_length}")
    if recipe.processes != "auto" and (not isinstance(recipe.processes, int) or recipe.processes < 1):
        raise ValueError(f"processes must be 'auto' or a positive integer, got {recipe.processes!r}")
    recipe.sequence_parallel.config()
    if recipe.lora is not None:
        recipe.lora_config()
    _check_model(recipe)
    _check_data(recipe)
    _check_validation(recipe)
    _check_groups(recipe)


def _check_data(recipe: Recipe) -> None:
    data, steps = recipe.data, recipe.setting("max_steps")
    if (data.files is None) == (data.dataset is None):
        raise ValueError(f"data needs files or dataset, one of them, got files={data.files} and dataset={data.dataset}")
    if data.chat_template is not None and data.format != "chat":
        raise ValueError(f"data.chat_template needs format: chat, got format: {data.format}; change one of them")
    if data.streaming and steps < 1:
        raise ValueError(
            f"data.streaming needs training.max_steps, since a stream's length is unknown, got {steps}; set it to a "
            "positive number"
        )


def _check_validation(recipe: Recipe) -> None:
    validation, when = recipe.validation, recipe.training.get("eval_strategy")
    if validation is None:
        if when not in (None, "no"):
            raise ValueError(
                "training.eval_strategy needs a section validation, which names the data, got eval_strategy: "
                f"{when}; add it, or leave eval_strategy out"
            )
        return
    if when == "no":
        raise ValueError("validation is never used with training.eval_strategy: no; leave one of them out")
    given = [name for name in ("share", "files", "dataset") if getattr(validation, name) is not None]
    if len(given) != 1:
        raise ValueError(f"validation needs exactly one of share, files and dataset, got {', '.join(given) or 'none'}")
    if validation.share is not None and not 0 < validation.share < 1:
        raise ValueError(f"validation.share must lie between 0 and 1, got {validation.share}")
    if validation.share is not None and recipe.data.streaming:
        raise ValueError(
            "validation.share needs stored rows, got data.streaming: true; name files or a dataset in validation"
        )


def _check_groups(recipe: Recipe) -> None:
    parallel, adaptive = recipe.sequence_parallel, recipe.sequence_parallel.size == "adaptive"
    if adaptive != (parallel.profile is not None):
        raise ValueError(
            "sequence_parallel.profile goes with size: adaptive, which needs it, got size: "
            f"{parallel.size} and profile: {parallel.profile}; set both or neither"
        )
    if adaptive and (recipe.data.streaming or recipe.data.packing != "none"):
        raise ValueError(
            "adaptive groups are planned from the lengths of stored documents, got data with streaming: "
            f"{recipe.data.streaming} and packing: {recipe.data.packing}; set packing: none, without streaming"
        )


def _check_model(recipe: Recipe) -> None:
    if "name_or_path" in recipe.model:
        check_section(recipe.model, LOADED_MODEL, "model with name_or_path")
    else:
        types = field_types(LinearLlama3Config, {"torch": torch, **vars(typing)})  # names that transformers omits
        check_section(recipe.model, {"preset": str, **types}, "model")
        try:
            recipe.model_config()
        except StrictDataclassError as error:
            raise ValueError(f"model in the recipe does not make a LinearLlama3Config: {error}") from error
