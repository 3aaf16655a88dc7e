"""Values of a YAML file as the types of a dataclass's fields, and messages that describe the expected value."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import re
from collections.abc import Sequence
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


def checked(kind: type, content: Any, where: str, *, sections: Sequence[str] = ()) -> dict[str, Any]:
    """Return `content` as arguments of the dataclass `kind`.

    Args:
        sections: names of mappings that are checked later, against separate annotations.

    Raises:
        ValueError: `content` is not a mapping, or has unknown names, missing names or values of the wrong type.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping of keys to values, got {content!r}")
    fields = dataclasses.fields(kind)
    check_names(content, [f.name for f in fields], where)
    unset = dataclasses.MISSING
    missing = [f.name for f in fields if f.default is f.default_factory is unset and f.name not in content]
    if missing:
        raise ValueError(f"{where} needs {', '.join(missing)}, got only {', '.join(sorted(content)) or 'nothing'}")
    content = dict(content)
    convert(content, get_type_hints(kind), where, sections=sections)
    return content


def check_names(content: dict[str, Any], known: list[str], where: str) -> None:
    """Raise ValueError for a key that is not known, with a suggestion."""
    for name in content:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known)[:20])}"
            raise ValueError(f"unknown key {name!r} in {where}; {hint}")


def convert(content: dict[str, Any], types: dict[str, Any], where: str, *, sections: Sequence[str] = ()) -> None:
    """Convert values in place to the types of their fields: `no` to False, 1e3 to an integer.

    Raises:
        ValueError: a value does not fit the type of its field.
    """
    for name, value in content.items():
        hint = yaml_type(types[name])
        fitting = [x for x in ([value] if name in sections else _meanings(value)) if _fits(x, hint)]
        if not fitting:
            remedy = ""
            if isinstance(value, str) and any(_fits(meaning, hint) for meaning in _meanings(_unquoted(value))):
                remedy = "; write it without quotes"
            elif isinstance(value, (bool, int, float)) and _fits(str(value), hint):
                remedy = "; write it in quotes"
            raise ValueError(f"{name} in {where} must be {_plain(hint)}, got {value!r}{remedy}")
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
