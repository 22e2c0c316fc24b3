"""Any client app as engines serve it, and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from lightning_fed.wire import messages
from lightning_fed.wire.served_app import ServedApp


class OneByOne(ServedApp):
    """Any ClientApp of Flower's: one message at a time, and nothing in it that an engine could change.

    Args:
        app: The ClientApp.
    """

    def __init__(self, app: ClientApp) -> None:
        self._app = app

    def __call__(self, message: Message, context: Context) -> Message:
        """See ``ServedApp``."""
        return self._app(message, context)

    def max_messages(self, stage: str) -> int:
        """See ``ServedApp``."""
        return 1

    def serve(self, received: Sequence[tuple[Message, Context]]) -> list[Message]:
        """See ``ServedApp``."""
        return [self(message, context) for message, context in received]

    def changes(self) -> bytes | None:
        """See ``ServedApp``."""
        return None

    def change(self, changes: bytes) -> None:
        """See ``ServedApp``."""

    def roots(self) -> dict[str, Any]:
        """See ``ServedApp``."""
        return {}


def served(app: ClientApp) -> ServedApp:
    """Return an app as engines serve it."""
    return app if isinstance(app, ServedApp) else OneByOne(app)


def answer(app: ServedApp, received: Sequence[tuple[Message, Context]]) -> list[Message]:
    """Return the replies to messages of one type, in their order; an exception is a reply."""
    if len(received) > 1:
        return app.serve(received)
    message, context = received[0]
    try:
        return [app(message, context)]
    except Exception as exception:
        return [messages.error_reply(message, exception)]
