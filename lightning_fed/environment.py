"""Defaults from the environment, as Lightning's ``PL_TRAINER_*``; and one fit at a time in a process."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from lightning.pytorch import Trainer

from lightning_fed.errors import ConfigurationError

Init = TypeVar("Init", bound=Callable[..., None])

# Seeds, signal handlers and Flower's identity of who sends are the process's, not a thread's.
_RUNNING = threading.RLock()


def given_in_environment(cls: type) -> dict[str, Any]:
    """The arguments that variables such as ``PL_FEDERATEDTRAINER_MAX_ROUNDS`` give, by name.

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
    """Lets ``__init__`` take what it is not given from the environment."""

    @functools.wraps(init)
    def with_defaults(self: object, **kwargs: Any) -> None:
        init(self, **{**given_in_environment(type(self)), **kwargs})

    return with_defaults  # type: ignore[return-value]


@contextmanager
def taken_from_environment(cls: type) -> Iterator[None]:
    """Hides these variables while Lightning's own ``Trainer`` looks for its defaults: they have been taken."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_prefix(cls))}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _prefix(cls: type) -> str:
    return f"PL_{cls.__name__.upper()}_"


@contextmanager
def alone() -> Iterator[None]:
    """The time of a fit.

    Raises:
        ConfigurationError: If another thread of this process is in a fit.
    """
    if not _RUNNING.acquire(blocking=False):
        raise ConfigurationError(
            "Another FederatedTrainer is fitting in another thread of this process. Random states, signal handlers and"
            " Flower's identity are the process's, so the two would disturb each other: fit one after the other, or"
            " each in a process of its own."
        )
    try:
        yield
    finally:
        _RUNNING.release()
