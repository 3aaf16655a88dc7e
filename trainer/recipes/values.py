"""Values of a YAML file as the types of a dataclass's fields, and messages that describe the expected value."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import re
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

BOOL, FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
WORDS = {"yes": True, "on": True, "no": False, "off": False}  # other spellings of booleans in YAML 1.1
PLAIN = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    list: "a list",
    NoneType: "null",
}


class _Loader(yaml.SafeLoader):
    """Keeps `no`, `on` and dates as text until the type of the field is known, and reads 1e-3 as a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (BOOL, "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(FLOAT, re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def field_types(kind: type, names: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the types of the arguments of a dataclass.

    Args:
        names: names in its annotations that its module does not define.
    """
    hints = get_type_hints(kind, localns=names)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}


def check_section(content: Any, types: Mapping[str, Any], where: str, *, sections: bool = False) -> None:
    """Check a mapping, and convert its values in place to the types of their keys: `no` to False, 1e3 to an integer.

    Args:
        sections: True leaves mappings in it unconverted; they are checked later, each against its own types.

    Raises:
        ValueError: `content` is not a mapping, has a key without a type, or a value that does not fit its type.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping of keys to values, got {content!r}")
    for name, value in content.items():
        if name not in types:
            close = difflib.get_close_matches(str(name), types, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(types)[:20])}"
            raise ValueError(f"unknown key {name!r} in {where}; {hint}")
        kind = yaml_type(types[name])
        meanings = [value] if sections and isinstance(value, dict) else _meanings(value)
        fitting = [meaning for meaning in meanings if _fits(meaning, kind)]
        if not fitting:
            remedy = ""
            if isinstance(value, str) and any(_fits(meaning, kind) for meaning in _meanings(_unquoted(value))):
                remedy = "; write it without quotes"
            elif isinstance(value, (bool, int, float)) and _fits(str(value), kind):
                remedy = "; write it in quotes"
            raise ValueError(f"{name} in {where} must be {_plain(kind)}, got {value!r}{remedy}")
        content[name] = fitting[0]


def _meanings(value: Any) -> list[Any]:
    """Return what a YAML value can mean, the most likely meaning first."""
    if isinstance(value, str) and value.lower() in WORDS:
        return [WORDS[value.lower()], value]
    if isinstance(value, float) and value.is_integer():
        return [value, int(value)]
    return [_with_booleans(value)] if isinstance(value, dict) else [value]


def _with_booleans(value: Any) -> Any:
    """Convert a mapping whose values have no annotation as YAML 1.1 does."""
    if isinstance(value, dict):
        return {key: _with_booleans(item) for key, item in value.items()}
    return WORDS.get(value.lower(), value) if isinstance(value, str) else value


def _unquoted(text: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        return text


def yaml_type(hint: Any) -> Any:
    """Return the annotation of the YAML values for a field with the annotation `hint`.

    An enumeration becomes the literal texts of its members (also next to `str`, which transformers adds for them), a
    tuple a list, a dataclass a mapping, float any number, and a special form of typing any value.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        enums = any(_is_enum(option) for option in args)
        return Union[tuple(yaml_type(option) for option in args if not (enums and option is str))]  # noqa: UP007
    if origin is Literal:
        return hint
    if _is_enum(hint):
        return Literal[tuple(member.value for member in hint)]
    kind = origin or hint
    if not isinstance(kind, type):
        return Any
    if kind is float:
        return float | int
    if kind in (list, tuple):
        return list[yaml_type(args[0])] if args else list  # type: ignore[misc]
    return dict if dataclasses.is_dataclass(kind) else kind


def _fits(value: Any, hint: Any) -> bool:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(value, bool) and not any(x in (bool, Any) or get_origin(x) is Literal for x in options):
        return False  # Python takes a bool for an int, and so do older releases of huggingface_hub
    try:
        type_validator("", value, hint)
    except TypeError:
        return False
    return True


def _plain(hint: Any) -> str:
    """Describe the values that fit a `yaml_type`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_plain(option) for option in args if option is not int or float not in args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is list:
        return f"a list (of {_plain(args[0])})"
    return PLAIN.get(hint, getattr(hint, "__name__", str(hint)))


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)
