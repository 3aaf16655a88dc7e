"""Releases of other libraries: what differs between the supported ones, and what is relied on in each.

Since 5.24 transformers calls the cache of a forward pass `cache`, in keywords, outputs and hooks; before, it was
`past_key_values`. This package says `cache` in its own code. `CACHE_NAME` and `cache_keyword` translate at the border.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from importlib import metadata
from types import CodeType
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import GenerationMixin, PreTrainedModel
from transformers import __version__ as version
from transformers.cache_utils import LinearAttentionLayer
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging

logger = logging.get_logger(__name__)

CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""The installed release's name of the cache."""

_OLD_NAME = "past_key_values"
_ALL_NAMES = ("cache", _OLD_NAME, "cache_params")


def cache_keyword(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function with a parameter `cache` so that callers give it under the installed release's name.

    Where the release's name is `cache`, `past_key_values` is still taken, as in transformers' own models.

    Raises:
        ValueError: two caches, or one under a name that the release does not use.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in _ALL_NAMES if name in kwargs}
        given = {name: cache for name, cache in given.items() if cache is not None}
        if not given:
            return function(*args, **kwargs)
        if len(given) > 1 or not given.keys() <= {CACHE_NAME, _OLD_NAME}:
            raise ValueError(
                f"transformers {version} calls the cache {CACHE_NAME}, got {' and '.join(given)}; pass the cache as "
                f"{CACHE_NAME} alone"
            )
        [(name, cache)] = given.items()
        if name != CACHE_NAME and not torch.compiler.is_compiling():
            logger.warning_once(f"`{name}` is deprecated: transformers {version} calls the cache `{CACHE_NAME}`")
        return function(*args, cache=cache, **kwargs)

    signature = inspect.signature(function)
    parameters = [p.replace(name=CACHE_NAME) if p.name == "cache" else p for p in signature.parameters.values()]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # generate reads it
    return call


def warn_untested(*libraries: str) -> None:
    """Warn once for each installed library whose release lies outside of the range that this package was tested with.

    The range is that of the package's own metadata, so of pyproject.toml. Patch releases never warn.
    """
    tested = _tested_ranges()
    for library in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):  # an extra that is not installed
            installed = metadata.version(library)
            if library in tested and Version(installed).base_version not in tested[library]:
                logger.warning_once(
                    f"linear_llama3 was tested with {library}{tested[library]}, found {installed}. Results may differ: "
                    f"run scripts/test_releases.sh of a checkout, and report what fails with this line."
                )


def _tested_ranges() -> dict[str, SpecifierSet]:
    try:
        lines = metadata.requires("linear-llama3") or ()
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        lines = ()
    return {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}


def check_hooks(owner: type, hooks: Mapping[str, tuple[str, ...]], attributes: Iterable[str] = ()) -> None:
    """Check that the private interfaces this package overrides or reads are still what it relies on.

    Args:
        owner: a class of another library.
        hooks: its methods -> the names of their first parameters after `self`. Further ones may follow.
        attributes: names that `owner` has or that its methods mention.

    Raises:
        ImportError: a method or name is missing, or a method has other parameters.
    """
    problems = []
    for name, expected in hooks.items():
        method = inspect.getattr_static(owner, name, None)
        if method is None:
            problems.append(f"no method {name}")
            continue
        method = method.__func__ if isinstance(method, staticmethod | classmethod) else method
        parameters = list(inspect.signature(method).parameters.values())
        any_kind = {p.kind for p in parameters} & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
        names = tuple(p.name for p in parameters if p.name not in ("self", "cls") and p.kind not in any_kind)
        first = expected[: len(names)] if any_kind else expected  # *args or **kwargs take the others
        if names[: len(first)] != first:
            problems.append(f"{name}({', '.join(names)}) in place of {name}({', '.join(expected)}, ...)")
    methods = [inspect.unwrap(x) for x in vars(owner).values() if inspect.isroutine(x)]
    mentioned = {name for method in methods if inspect.isfunction(method) for name in _names(method.__code__)}
    problems += [f"no {name}" for name in attributes if name not in mentioned and not hasattr(owner, name)]
    if problems:
        library = owner.__module__.partition(".")[0]
        tested = _tested_ranges().get(library, "")
        raise ImportError(
            f"{library} changed what linear_llama3 relies on: {owner.__name__} has {'; '.join(problems)}. Install a "
            f"release that linear_llama3 was tested with: {library}{tested}"
        )


def _names(code: CodeType) -> Iterator[str]:
    """Attributes, global names and strings that a function uses."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant


MODEL_HOOKS = {
    "_init_weights": ("module",),
    "_upload_modified_files": ("working_dir", "repo_id"),
    "should_save_on_this_rank": ("is_main_process",),
}
GENERATION_HOOKS = {
    "_get_deprecated_gen_repo": ("generation_mode",),
    "_prefill": ("input_ids", "generation_config", "model_kwargs"),
    "_prepare_cache_for_generation": ("generation_config", "model_kwargs"),
}

check_hooks(PreTrainedModel, MODEL_HOOKS, ("_hf_peft_config_loaded",))
check_hooks(GenerationMixin, GENERATION_HOOKS, (CACHE_NAME, "create_masks_for_generate", "is_compileable"))
check_hooks(
    LinearAttentionLayer,
    {"update_recurrent_state": ("recurrent_states",)},
    ("has_previous_state", "is_recurrent_states_initialized", "recurrent_states"),
)
warn_untested("transformers", "torch")

CHUNKS_CACHED_TOKENS = "prefill_ids" not in inspect.unwrap(GenerationMixin._prefill).__code__.co_varnames
"""Whether the release's chunked prefill computes cached tokens again, as 5.17 does: it cuts them off in no chunk."""
