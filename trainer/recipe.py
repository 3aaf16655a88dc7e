"""A recipe: the YAML file that says what is trained on what, and how.

model: {linear_attention_type: gla, num_hidden_layers: 4, hidden_size: 256}
                                             # or {preset: linear-llama3-1b-gla-hybrid-1-4}, or {name_or_path: folder}
tokenizer: runs/tokenizer
data: {files: corpus/}                       # files, folders, patterns; or {dataset: name, split: train}
sequence_length: 8192
sequence_parallel: {size: auto, linear: lasp2, softmax: lasp2h, layout: auto}  # or {size: adaptive, profile: FILE.json}
lora: {r: 16, lora_alpha: 32}                # adapters in place of all weights: any field of PEFT's LoraConfig
processes: auto                              # of `linear-llama3 train`: all GPUs, or one process on the CPU
training: {output_dir: runs/out, max_steps: 100, learning_rate: 1e-3}         # any TrainingArguments field

A launch can change values of the file: `RECIPE.yaml sequence_parallel.softmax=ring training.max_steps=10`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import SchedulerType

from ..modeling import LinearLlama3Config
from ..sequence_parallel import SequenceParallelConfig
from .arguments import LinearLlama3TrainingArguments

if TYPE_CHECKING:
    from peft import LoraConfig

LOADED_MODEL: dict[str, Any] = {
    "name_or_path": str,
    "dtype": Literal["float32", "bfloat16", "float16"],
    "rope_parameters": dict,
}
"""What the section `model` may say of weights to start from, and its types. `dtype` is that of the weights in memory:
float32, or under `lora`, where they stay as they are, what they were saved in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecipe:
    """Documents: local `files` or a `dataset` of the `datasets` library, one of both; and how they become rows.

    - `files`: folders, patterns or names of JSON lines (.jsonl, .json), Parquet (.parquet) or text (all others, one
      document per file). `arguments` are further ones of `datasets.load_dataset`: name, revision, on_bad_files, ...
    - `format`: "text" reads `text_column`, between the tokenizer's special tokens. "chat" reads `messages` through the
      tokenizer's chat template (or that of the file `chat_template`), with a loss on the assistant's turns, or `prompt`
      and `completion` (strings, or messages as well), with a loss on the completion.
    - `streaming`: nothing is stored; documents are read, tokenized and packed while the model trains.
    - `packing`: "wrapped" lays documents end to end and cuts at the end of a row, "best_fit" fills rows with whole
      documents, "none" makes every document a row. Attention never crosses the edge of a document.
    - `long_documents`: what is beyond `sequence_length` tokens of a document: "continue" makes it a document of its
      own, "cut" leaves it out.
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
class SequenceParallelRecipe:
    """Degree, strategies and layout.

    `size: adaptive` plans groups for every step, by a `profile` of the planner (a name or a JSON file); a step takes
    `training.per_device_train_batch_size` rows for each process, and rows are documents (`data.packing: none`).
    """

    size: int | str = "auto"
    profile: str | None = None
    linear: str = "lasp2"
    softmax: str = "lasp2h"
    layout: str = "auto"

    def config(self) -> SequenceParallelConfig:
        return SequenceParallelConfig(linear=self.linear, softmax=self.softmax, layout=self.layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole run.

    `model` holds LinearLlama3Config's fields, in place of those of a `preset` if one is named, or `name_or_path` of
    weights to start from and what may be changed of them (`LOADED_MODEL`); `lora` the fields of PEFT's LoraConfig;
    `training` those of transformers' TrainingArguments but for those that the section `sequence_parallel` stands for.
    `processes` is for `linear-llama3 train` alone: who launches has said how many.
    """

    model: dict[str, Any]
    tokenizer: str
    data: DataRecipe
    sequence_length: int
    training: dict[str, Any]
    sequence_parallel: SequenceParallelRecipe = field(default_factory=SequenceParallelRecipe)
    lora: dict[str, Any] | None = None
    processes: int | str = "auto"

    def model_config(self, **facts: Any) -> LinearLlama3Config:
        """The section `model` of a model to be made anew.

        Args:
            facts: what the tokenizer says; the recipe's own fields go before it, and a preset's behind.
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
        """The section `lora`; PEFT has no `target_modules` for this model: all linear layers but the head."""
        assert self.lora is not None
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ValueError("lora needs PEFT, which is not installed; run `pip install peft`") from error
        _check_names(self.lora, [f.name for f in dataclasses.fields(LoraConfig) if f.init], "lora")
        try:
            return LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **self.lora})
        except (TypeError, ValueError) as error:
            raise ValueError(f"lora in the recipe does not make a LoraConfig: {error}") from error

    def training_arguments(self) -> LinearLlama3TrainingArguments:
        """The section `training`, with the choices of `sequence_parallel`."""
        parallel = self.sequence_parallel
        return LinearLlama3TrainingArguments(
            sequence_parallel_size=parallel.size,
            linear_strategy=parallel.linear,
            softmax_strategy=parallel.softmax,
            sequence_layout=parallel.layout,
            planner_profile=parallel.profile,
            **self.training,
        )


def load_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        changes: "key=value" or "section.key=value", in place of what the file says.

    Raises:
        ValueError: no such file, no YAML mapping, an unknown or missing key, a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"a recipe must be a YAML file, got {str(path)!r}, which does not exist")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"a recipe must be YAML, {path} is not: {error}") from error
    for change in changes:
        _apply(change, content)
    values = _checked(Recipe, content, f"recipe {path}")
    values["data"] = DataRecipe(**_checked(DataRecipe, values["data"], "data"))
    if "sequence_parallel" in values:
        parallel = _checked(SequenceParallelRecipe, values["sequence_parallel"], "sequence_parallel")
        values["sequence_parallel"] = SequenceParallelRecipe(**parallel)
    recipe = Recipe(**values)
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
        content[key] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"a change's value must be YAML, {change!r} is not: {error}") from error


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number; YAML 1.1 takes it for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _check_values(recipe: Recipe) -> None:
    if recipe.sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2 (a token and the next), got {recipe.sequence_length}")
    data = recipe.data
    if (data.files is None) == (data.dataset is None):
        raise ValueError(f"data needs files or dataset, one of them, got files={data.files} and dataset={data.dataset}")
    if data.chat_template is not None and data.format != "chat":
        raise ValueError(f"data.chat_template needs format: chat, got format: {data.format}; change one of them")
    if data.streaming and recipe.training.get("max_steps", -1) < 1:
        raise ValueError(
            f"data.streaming needs training.max_steps, since a stream's length is unknown, got "
            f"{recipe.training.get('max_steps')}; set it"
        )
    if recipe.processes != "auto" and (not isinstance(recipe.processes, int) or recipe.processes < 1):
        raise ValueError(f"processes must be 'auto' or a positive integer, got {recipe.processes!r}")
    recipe.sequence_parallel.config()
    _check_groups(recipe)
    if recipe.lora is not None:
        recipe.lora_config()
    _check_model(recipe)
    own = {"sequence_parallel_size", "linear_strategy", "softmax_strategy", "sequence_layout", "planner_profile"}
    own |= {"parallelism_config"}
    hints, fields = get_type_hints(LinearLlama3TrainingArguments), dataclasses.fields(LinearLlama3TrainingArguments)
    types = {f.name: hints[f.name] for f in fields if f.init and f.name not in own}
    types["fsdp"] |= bool  # transformers 5.23 warns of strings
    types["lr_scheduler_type"] = Literal[tuple(kind.value for kind in SchedulerType)]
    _check_names(recipe.training, list(types), "training")
    _check_types(recipe.training, types, "training")
    if (when := recipe.training.get("eval_strategy", "no")) != "no":
        raise ValueError(
            f"a recipe has no data to evaluate on while it trains, got training.eval_strategy: {when}; leave it out, "
            "and evaluate checkpoints by python -m linear_llama3.trainer.evaluation"
        )
    if recipe.training.get("deepspeed") is not None:
        raise ValueError("DeepSpeed is not supported, got training.deepspeed; use fsdp, or leave it out")


def _check_groups(recipe: Recipe) -> None:
    parallel, adaptive = recipe.sequence_parallel, recipe.sequence_parallel.size == "adaptive"
    if adaptive != (parallel.profile is not None):
        raise ValueError(
            "sequence_parallel.profile goes with size: adaptive, which is planned by it, got size: "
            f"{parallel.size} and profile: {parallel.profile}"
        )
    if adaptive and (recipe.data.streaming or recipe.data.packing != "none"):
        raise ValueError(
            "adaptive groups are planned from the lengths of stored documents, got data with streaming: "
            f"{recipe.data.streaming} and packing: {recipe.data.packing}; set packing: none, without streaming"
        )


def _check_model(recipe: Recipe) -> None:
    if "name_or_path" in recipe.model:
        _check_names(recipe.model, list(LOADED_MODEL), "model with name_or_path")
        _check_types(recipe.model, LOADED_MODEL, "model")
    else:
        known = [f.name for f in dataclasses.fields(LinearLlama3Config)]
        _check_names(recipe.model, ["preset", *known], "model")
        try:
            recipe.model_config()
        except StrictDataclassError as error:
            raise ValueError(f"model in the recipe does not make a LinearLlama3Config: {error}") from error


def _checked(kind: type, content: Any, where: str) -> dict[str, Any]:
    """`content` as the arguments of the dataclass `kind`."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping of keys to values, got {type(content).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _check_names(content, list(fields), where)
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in content]
    if missing:
        raise ValueError(f"{where} needs {', '.join(missing)}, got only {', '.join(sorted(content)) or 'nothing'}")
    _check_types(content, get_type_hints(kind), where)
    return dict(content)


def _check_types(content: dict[str, Any], types: dict[str, Any], where: str) -> None:
    for name, value in content.items():
        if not _fits(value, types[name]):
            hint = types[name]
            expected = "a mapping" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))
            if get_origin(hint) is Literal:
                expected = f"one of {', '.join(get_args(hint))}"
            raise ValueError(f"{name} in {where} must be {expected}, got {value!r} ({type(value).__name__})")


def _fits(value: Any, hint: Any) -> bool:
    """Whether what YAML gave can be meant for a field with this annotation."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    kind = origin or hint
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _check_names(content: dict[str, Any], known: list[str], where: str) -> None:
    for name in content:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known)[:20])}"
            raise ValueError(f"unknown key {name!r} in {where}; {hint}")
