"""A cache for what is asked again and again of the same classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def cached(size: int) -> Callable[[Function], Function]:
    """Keep what a function returned, for the last so many arguments.

    As ``functools.lru_cache``, but for its type: the function's own, where mypy takes no ``type`` to be hashable.
    """
    return cast(Callable[[Function], Function], lru_cache(maxsize=size))
