"""Defaults from the environment, as Lightning's ``PL_TRAINER_*``."""

from __future__ import annotations

import ast
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

from lightning.pytorch import Trainer

Init = TypeVar("Init", bound=Callable[..., None])


def given_in_environment(cls: type) -> dict[str, Any]:
    """Return the arguments that variables such as ``PL_FEDERATEDTRAINER_MAX_ROUNDS`` give, by name.

    Args:
        cls: A ``FederatedTrainer``: its own arguments and those of a ``Trainer`` are looked for.
    """
    given: dict[str, Any] = {}
    for name in {**inspect.signature(cls).parameters, **inspect.signature(Trainer).parameters}:
        text = os.environ.get(f"{_prefix(cls)}{name.upper()}", "")
        if text:
            given[name] = text
            with suppress(ValueError, SyntaxError):  # a word stands for itself
                given[name] = ast.literal_eval(text)
    return given


def defaults_from_environment(init: Init) -> Init:
    """Let ``__init__`` take what it is not given from the environment."""

    @functools.wraps(init)
    def with_defaults(self: object, **kwargs: Any) -> None:
        init(self, **{**given_in_environment(type(self)), **kwargs})

    return cast(Init, with_defaults)


@contextmanager
def taken_from_environment(cls: type) -> Iterator[None]:
    """Hide these variables while Lightning's own ``Trainer`` looks for its defaults: they have been taken."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_prefix(cls))}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _prefix(cls: type) -> str:
    return f"PL_{cls.__name__.upper()}_"
