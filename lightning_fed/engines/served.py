"""What an engine asks of a client app, beyond what Flower's own can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from lightning_fed.client.app import LocalClientApp
from lightning_fed.wire import messages


class Served(Protocol):
    """A client app as engines serve it: maybe several clients at once, and with copies in other processes."""

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply to one message."""

    def at_once(self, stage: str) -> int:
        """How many messages of a type to give to ``serve``."""

    def serve(self, received: Sequence[tuple[Message, Context]]) -> list[Message]:
        """The replies to several messages of one type, in their order."""

    def changes(self) -> bytes | None:
        """What has changed here since this was asked last, for ``change`` of the copies in other processes."""

    def change(self, changes: bytes) -> None:
        """Makes the changes that another process' ``changes`` gave."""

    def roots(self) -> dict[str, Any]:
        """All that clients work with, by name."""


class OneByOne:
    """Any ClientApp of Flower's: one message at a time, and nothing in it that an engine could change.

    Args:
        app: The ClientApp.
    """

    def __init__(self, app: ClientApp) -> None:
        self._app = app

    def __call__(self, message: Message, context: Context) -> Message:
        """See ``Served``."""
        return self._app(message, context)

    def at_once(self, stage: str) -> int:
        """See ``Served``."""
        return 1

    def serve(self, received: Sequence[tuple[Message, Context]]) -> list[Message]:
        """See ``Served``."""
        return [self(message, context) for message, context in received]

    def changes(self) -> bytes | None:
        """See ``Served``."""
        return None

    def change(self, changes: bytes) -> None:
        """See ``Served``."""

    def roots(self) -> dict[str, Any]:
        """See ``Served``."""
        return {}


def served(app: ClientApp) -> Served:
    """An app as engines serve it."""
    return app if isinstance(app, LocalClientApp) else OneByOne(app)


def answer(app: Served, received: Sequence[tuple[Message, Context]]) -> list[Message]:
    """The replies to messages of one type, in their order; an exception is a reply."""
    if len(received) > 1:
        return app.serve(received)
    message, context = received[0]
    try:
        return [app(message, context)]
    except Exception as exception:
        return [messages.error_reply(message, exception)]
