"""Ray actors as the engine sees them: those that have started, those that wait for room, and what runs in one."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord

from lightning_fed._compat.flower import server_identity
from lightning_fed.engines import transport
from lightning_fed.engines.worker import Start, Task, serve
from lightning_fed.errors import ConfigurationError

# Actors that end so often in a row without having started will not start, unless others work.
_ATTEMPTS = 3


class Actors:
    """The actors of one run. One that has not started is given no work: where it is to be there may be no room.

    Args:
        ray: Ray's module.
        make: Makes an actor.

    Attributes:
        live: Those that have started.
    """

    def __init__(self, ray: Any, make: Callable[[], Any]) -> None:
        self._ray, self._make = ray, make
        self.live: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._failures = 0

    def __len__(self) -> int:
        """Return how many there are, started or not."""
        return len(self.live) + len(self._starting)

    @property
    def starting(self) -> list[Any]:
        """References that are ready when an actor has started, or has ended before; ``started`` takes them."""
        return list(self._starting)

    def grow(self, count: int) -> None:
        """Ask for actors until there are so many."""
        while len(self) < count:
            self._ask()

    def started(self, reference: Any) -> Any | None:
        """Return the actor that has started; ``None`` if it has ended, and another is asked for.

        Raises:
            ConfigurationError: If it cannot work, or if one after the other ends before it has started.
        """
        actor = self._starting.pop(reference)
        try:
            said = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            self._failures += 1
            if self._failures >= _ATTEMPTS and not self.live:
                raise ConfigurationError(
                    f"{_ATTEMPTS} Ray actors in a row could not start: the last one {how_it_ended(error)}."
                ) from error
            self._ask()
            return None
        if said is not None:
            self._ray.kill(actor)
            raise ConfigurationError(f"A Ray actor cannot start:\n{said}")
        self._failures = 0
        self.live.append(actor)
        return actor

    def replace(self, actor: Any) -> None:
        """End an actor, and ask for another."""
        self._ray.kill(actor)
        self.live.remove(actor)
        self._ask()

    def end(self) -> None:
        """End all."""
        for actor in [*self.live, *self._starting.values()]:
            self._ray.kill(actor)
        self.live, self._starting = [], {}

    def _ask(self) -> None:
        actor = self._make()
        self._starting[actor.said.remote()] = actor


def how_it_ended(error: Exception) -> str:
    """Return what Ray says of an actor that has ended, in one line."""
    return f"ended ({type(error).__name__}: {' '.join(str(error).split())})"


class Actor:
    """Serves one client after the other, in a process of Ray's.

    Args:
        start: What it begins with.
    """

    def __init__(self, start: Any) -> None:
        self._start: Start | None = None
        self._said: str | None = None
        self._known: dict[tuple[int, int], ArrayRecord] = {}
        try:
            self._start = transport.from_bytes(start)
            torch.set_num_threads(self._start.threads)
        except Exception:
            self._said = traceback.format_exc()

    def said(self) -> str | None:
        """Return why it cannot work, or ``None``."""
        return self._said

    def work(self, task: Any, *ahead: Any) -> Any:
        """Do one client's work; ``ahead`` are numbers and the arrays that they stand for."""
        assert self._start is not None
        told: list[Task] = transport.from_bytes(task)
        call = told[0].call
        self._known = {key: record for key, record in self._known.items() if key[0] == call}
        for number, arrays in zip(ahead[::2], ahead[1::2], strict=True):
            if (call, number) not in self._known:
                self._known[call, number] = transport.from_bytes(arrays)
        with server_identity(self._start.run_id):
            return as_array(serve(self._start.app, told, self._known, transport.to_bytes))


def as_array(packed: bytes) -> Any:
    """Return bytes as what Ray's store hands out without a copy."""
    return np.frombuffer(packed, dtype=np.uint8)
