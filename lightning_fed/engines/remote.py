"""What engines have in common whose clients work in other processes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from flwr.app import Message

from lightning_fed.engines.in_process import InProcessGrid
from lightning_fed.engines.worker import Done, Start, Task
from lightning_fed.errors import ConfigurationError

T = TypeVar("T")

# Replies that wait for one before them are held: how many clients a worker may be ahead of the first that is missing.
AHEAD = 4


class RemoteGrid(InProcessGrid):
    """A Grid whose clients work in other processes, while their contexts stay here."""

    _calls = 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The replies in the order of the messages, each as soon as it and those before it are there."""
        sent = list(messages)
        for message in sent:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        self._calls += 1
        yield from self._exchange(sent, self._calls, timeout)

    def _exchange(self, sent: list[Message], call: int, timeout: float | None) -> Iterator[Message]:
        """The replies; ``call`` is the number of this exchange in the run."""
        raise NotImplementedError

    def task(self, message: Message, content: dict[str, Any], call: int) -> Task:
        """What a worker is told of a message, and of its client."""
        return Task(message.metadata, content, call, self._context_of(message))

    def take_back(self, message: Message, done: Done) -> Message:
        """A reply as the loop gets it; what the client keeps goes to its context."""
        if done.state is not None:
            self._context_of(message).state = done.state
        done.reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        return done.reply


def packed(start: Start, engine: str, pack: Callable[..., T]) -> T:
    """What workers begin with, packed.

    Raises:
        ConfigurationError: If something in it cannot be pickled.
    """
    try:
        return pack(start, by_value=True)
    except Exception as error:
        raise ConfigurationError(
            f"engine={engine!r} sends the module, the data and the client callbacks to its workers, and something in"
            f" them cannot be pickled: {type(error).__name__}: {error}. Make it in a hook of the local fit, or write"
            " engine='in_process'."
        ) from error
