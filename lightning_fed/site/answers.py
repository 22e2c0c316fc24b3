"""What a site makes of a message: its client's work, with what the client keeps before and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from lightning_fed.errors import ClientError
from lightning_fed.site.states import StateFolder
from lightning_fed.wire import messages, packing, roll_call


class Answers:
    """A client's replies.

    Args:
        app: What the client runs.
        compare: Raises if the site is set up otherwise than a question says.
        client: The client.
        states: What it keeps.
    """

    def __init__(self, app: ClientApp, compare: Callable[[Message], None], client: int, states: StateFolder) -> None:
        self._app, self._compare, self._client, self._states = app, compare, client, states
        self._last: tuple[roll_call.WorkMarks, RecordDict | ClientError] | None = None  # the last work and its reply

    def to(self, message: Message, node_id: int) -> Message:
        """Return the reply to a message; an exception is one."""
        try:
            return self._made(message, node_id)
        except Exception as exception:
            return messages.error_reply(message, exception)

    def give_up(self, mark: str, error: ClientError) -> None:
        """Answer a piece of work with an error if it comes again: its reply does not get through."""
        if self._last is not None and self._last[0].mark == mark:
            self._last = self._last[0], error

    def _made(self, message: Message, node_id: int) -> Message:
        packing.unpack_content(message.content)
        if message.metadata.message_type == MessageType.QUERY:
            self._compare(message)
        kept = roll_call.take_kept(message.content)
        if kept is not None and self._last is not None and kept == self._last[0]:
            # The server does not know whether the SuperLink, which was away, has lost the reply.
            if isinstance(self._last[1], ClientError):
                return messages.error_reply(message, self._last[1])
            return Message(self._last[1], reply_to=message)
        base = self._states.load(kept.base) if kept else RecordDict()
        config: dict[str, Any] = {messages.CLIENT: self._client}
        context = Context(message.metadata.run_id, node_id, config, messages.copy_for_delivery(base), {})
        reply = self._app(message, context)
        if reply.has_error() or message.metadata.message_type == MessageType.QUERY:
            return reply
        if kept is not None and context.state != base:
            self._states.save(kept.mark, context.state)
            roll_call.say_kept(reply.content)
        self._last = None if kept is None else (kept, reply.content)
        return reply
