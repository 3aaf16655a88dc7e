"""Convert YAML values to the types of a dataclass's fields, and describe in plain words what is expected."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import re
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

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
        sections: names of mappings that are checked later, against annotations of their own.

    Raises:
        ValueError: `content` is not a mapping, or has unknown names, missing names or values of the wrong type.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping of keys to values, got {content!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    check_names(content, list(fields), where)
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in content]
    if missing:
        raise ValueError(f"{where} needs {', '.join(missing)}, got only {', '.join(sorted(content)) or 'nothing'}")
    content = dict(content)
    convert(content, get_type_hints(kind), where, sections=sections)
    return content


def check_names(content: dict[str, Any], known: list[str], where: str) -> None:
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
        hint = types[name]
        for candidate in [value] if name in sections else _candidates(value):
            if _fits(candidate, hint):
                content[name] = candidate
                break
        else:
            remedy = ""
            if isinstance(value, str) and any(_fits(candidate, hint) for candidate in _candidates(_unquoted(value))):
                remedy = "; write it without quotes"
            elif isinstance(value, (bool, int, float)) and _fits(str(value), hint):
                remedy = "; write it in quotes"
            raise ValueError(f"{name} in {where} must be {_plain(hint)}, got {value!r}{remedy}")


def _candidates(value: Any) -> list[Any]:
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


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is valid for a field with this annotation."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        options = get_args(hint)
        if isinstance(value, str) and any(_is_enum(option) for option in options):  # with `str` for their values
            options = tuple(option for option in options if option is not str)
        return any(_fits(value, option) for option in options)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if _is_enum(hint):
        return value in [member.value for member in hint]
    kind = origin or hint
    if not isinstance(kind, type):  # a special form of typing
        return True
    if kind in (list, tuple):  # YAML has no tuples
        items = get_args(hint)[:1]
        return isinstance(value, list) and all(_fits(item, kind) for kind in items for item in value)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _plain(hint: Any) -> str:
    """Describe the values that fit an annotation."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        options = get_args(hint)
        if any(_is_enum(option) for option in options):
            options = tuple(option for option in options if option is not str)
        return " or ".join(dict.fromkeys(_plain(option) for option in options))
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if _is_enum(hint):
        return f"one of {', '.join(member.value for member in hint)}"
    kind = origin or hint
    if kind is list and get_args(hint):
        return f"a list (of {_plain(get_args(hint)[0])})"
    return PLAIN.get(kind, "a mapping" if dataclasses.is_dataclass(kind) else getattr(kind, "__name__", str(kind)))


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)
