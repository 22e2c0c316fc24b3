"""What an engine asks of a client app, beyond what Flower's own can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from flwr.app import Context, Message


class ServedApp(ABC):
    """A client app as engines serve it: maybe several clients at once, and with copies in other processes."""

    @abstractmethod
    def __call__(self, message: Message, context: Context) -> Message:
        """Return the reply to one message."""

    @abstractmethod
    def max_messages(self, stage: str) -> int:
        """Return how many messages of a type to give to ``serve``."""

    @abstractmethod
    def serve(self, received: Sequence[tuple[Message, Context]]) -> list[Message]:
        """Return the replies to several messages of one type, in their order."""

    @abstractmethod
    def changes(self) -> bytes | None:
        """Return what has changed here since this was asked last, for ``change`` of the copies in other processes."""

    @abstractmethod
    def change(self, changes: bytes) -> None:
        """Make the changes that another process' ``changes`` gave."""

    @abstractmethod
    def roots(self) -> dict[str, Any]:
        """Return all that clients work with, by name."""
