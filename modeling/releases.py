"""What differs between the supported releases of transformers, in one place.

Since 5.24 transformers calls the cache of a forward pass `cache`, in keywords, outputs and hooks; before, it was
`past_key_values`. This package says `cache` in its own code. `CACHE_NAME` and `cache_keyword` translate at the border.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import __version__ as version
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
        if name != CACHE_NAME:
            logger.warning_once(f"`{name}` is deprecated: transformers {version} calls the cache `{CACHE_NAME}`")
        return function(*args, cache=cache, **kwargs)

    signature = inspect.signature(function)
    parameters = [p.replace(name=CACHE_NAME) if p.name == "cache" else p for p in signature.parameters.values()]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # generate reads it
    return call
