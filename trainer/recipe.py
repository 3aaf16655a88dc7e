"""A recipe: the YAML file that says what is trained on what, and how.

model: {linear_attention_type: gla, num_hidden_layers: 4, hidden_size: 256}
                                             # or {preset: linear-llama3-1b-gla-hybrid-1-4}, or {name_or_path: folder}
tokenizer: runs/tokenizer
data: {files: corpus/}                       # files, folders, patterns; or {dataset: name, split: train}
sequence_length: 8192
sequence_parallel: {size: auto, linear: lasp2, softmax: lasp2h, layout: auto}
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
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.errors import StrictDataclassError

from ..modeling import LinearLlama3Config
from ..sequence_parallel import SequenceParallelConfig
from .arguments import LinearLlama3TrainingArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecipe:
    """Local text (`files`: one document per file) or a dataset of the `datasets` library, one of both.

    `arguments` are further ones of `datasets.load_dataset`: name, revision, data_dir, ...
    """

    files: str | list[str] | None = None
    dataset: str | None = None
    split: str = "train"
    arguments: dict[str, Any] = field(default_factory=dict)
    text_column: str = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceParallelRecipe:
    """Degree, strategies and layout."""

    size: int | str = "auto"
    linear: str = "lasp2"
    softmax: str = "lasp2h"
    layout: str = "auto"

    def config(self) -> SequenceParallelConfig:
        return SequenceParallelConfig(linear=self.linear, softmax=self.softmax, layout=self.layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole run.

    `model` holds LinearLlama3Config's fields, in place of those of a `preset` if one is named, or `name_or_path` of
    weights to start from; `training` the fields of transformers' TrainingArguments but for those that the section
    `sequence_parallel` stands for.
    """

    model: dict[str, Any]
    tokenizer: str
    data: DataRecipe
    sequence_length: int
    training: dict[str, Any]
    sequence_parallel: SequenceParallelRecipe = field(default_factory=SequenceParallelRecipe)

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

    def training_arguments(self) -> LinearLlama3TrainingArguments:
        """The section `training`, with the choices of `sequence_parallel`."""
        parallel = self.sequence_parallel
        return LinearLlama3TrainingArguments(
            sequence_parallel_size=parallel.size,
            linear_strategy=parallel.linear,
            softmax_strategy=parallel.softmax,
            sequence_layout=parallel.layout,
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
    content[key] = yaml.load(value, _Loader)


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
    recipe.sequence_parallel.config()
    if "name_or_path" in recipe.model:
        _check_names(recipe.model, ["name_or_path"], "model with name_or_path")
    else:
        known = [f.name for f in dataclasses.fields(LinearLlama3Config)]
        _check_names(recipe.model, ["preset", *known], "model")
        try:
            recipe.model_config()
        except StrictDataclassError as error:
            raise ValueError(f"model in the recipe does not make a LinearLlama3Config: {error}") from error
    own = {"sequence_parallel_size", "linear_strategy", "softmax_strategy", "sequence_layout", "parallelism_config"}
    hints, fields = get_type_hints(LinearLlama3TrainingArguments), dataclasses.fields(LinearLlama3TrainingArguments)
    types = {f.name: hints[f.name] for f in fields if f.init and f.name not in own}
    _check_names(recipe.training, list(types), "training")
    _check_types(recipe.training, types, "training")


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
