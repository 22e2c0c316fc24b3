"""What engines have in common whose clients work in other processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from flwr.app import Message
from flwr.clientapp import ClientApp

from lightning_fed._compat.flower import number
from lightning_fed.engines import transport
from lightning_fed.engines.in_process import InProcessGrid
from lightning_fed.engines.worker import Done, Start, Task
from lightning_fed.errors import ConfigurationError
from lightning_fed.tracebacks import words

T = TypeVar("T")

# Replies that wait for one before them are held: how many clients a worker may be ahead of the first that is missing.
AHEAD = 4


class TimeLimit:
    """The time that the replies of one exchange have.

    In the first half of it a client that is slow holds back those far behind it, which bounds memory; in the second
    half it does not any more, so that one client that hangs costs the round one reply.

    Args:
        timeout: Seconds; ``None`` for no end.
    """

    def __init__(self, timeout: float | None) -> None:
        now = time.monotonic()
        seconds = None if timeout is None or math.isinf(timeout) else timeout
        self._half = None if seconds is None else now + seconds / 2
        self._end = None if seconds is None else now + seconds

    @property
    def is_up(self) -> bool:
        """Whether all time is over."""
        return self._end is not None and time.monotonic() >= self._end

    @property
    def presses(self) -> bool:
        """Whether half of it is over."""
        return self._half is not None and time.monotonic() >= self._half

    @property
    def seconds(self) -> float | None:
        """How long to wait for a reply before looking at the time again."""
        until = self._end if self.presses else self._half
        return None if until is None else max(0.0, until - time.monotonic())


class RemoteGrid(InProcessGrid):
    """A Grid whose clients work in other processes, while their contexts stay here."""

    _calls = 0

    def __init__(self, client_app: ClientApp, num_clients: Callable[[], int]) -> None:
        super().__init__(client_app, num_clients)
        self.changes: list[bytes] = []  # of what workers have copies of; each is told those that came after its start

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Return the replies in the order of the messages, each as soon as it and those before it are there."""
        sent = list(messages)
        for message in sent:
            number(message)
        self._calls += 1
        if (changes := self.app.changes()) is not None:
            self.changes.append(changes)
        yield from self._exchange(sent, self._calls, timeout)

    def _exchange(self, sent: list[Message], call: int, timeout: float | None) -> Iterator[Message]:
        """Return the replies; ``call`` is the number of this exchange in the run."""
        raise NotImplementedError

    def task(self, message: Message, content: dict[str, Any], call: int, changes: Sequence[bytes]) -> Task:
        """Return what a worker is told of a message, of its client, and of what the server has changed."""
        return Task(message.metadata, content, call, self._context_of(message), changes)

    def take_back(self, message: Message, done: Done) -> Message:
        """Return a reply as the loop gets it; what the client keeps goes to its context."""
        if done.state is not None:
            self._keep(message, done.state)
        number(done.reply)
        if done.exception is not None:
            done.reply.error.__dict__["exception"] = _exception(done.exception, done.reply.error.reason)
        return done.reply


def _exception(pickled: bytes, said: str | None) -> BaseException | None:
    """Return a client's exception, if it survived the way: some read back as nothing, some with other words."""
    try:
        exception = transport.from_bytes(pickled)
        return exception if (said or "").startswith(words(exception)) else None
    except Exception:
        return None


def packed(start: Start, engine: str, pack: Callable[..., T], instead: str = "") -> T:
    """Return what workers begin with, packed.

    Args:
        start: What they begin with.
        engine: The engine's name.
        pack: ``pack(start, by_value=True)`` packs it.
        instead: What else one can do with this engine: a sentence.

    Raises:
        ConfigurationError: If something in it cannot be pickled.
    """
    try:
        return pack(start, by_value=True)
    except Exception as error:
        raise ConfigurationError(
            f"engine={engine!r} sends the module, the data and the client callbacks to its workers, and"
            f" {_unpicklable(start)} cannot be pickled: {type(error).__name__}: {error}. Make it in a hook of the local"
            f" fit, or write engine='in_process'. {instead}".rstrip()
        ) from error


def _unpicklable(start: Start) -> str:
    """Return the first attribute that cannot be pickled, as one would write it."""
    for name, root in start.app.roots().items():
        for key, value in (root if isinstance(root, dict) else getattr(root, "__dict__", {})).items():
            try:
                transport.dump(value, by_value=True)
            except Exception:
                return f"{name}.{key}"
    return "something in them"
