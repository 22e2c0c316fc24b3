"""An engine that hears what clients are sent, and what they send."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, Message
from flwr.clientapp import ClientApp

from lightning_fed._compat.flower import server_identity
from lightning_fed.engines import Engine
from lightning_fed.engines.in_process import InProcessGrid


class Listens(Engine):
    """Keeps all bytes that go from client to server, and back."""

    name = "listens"

    def __init__(self) -> None:
        self.heard: list[tuple[Message, bytes]] = []

    def run(self, main: Any, client_app: ClientApp, num_clients: Any) -> Any:
        grid = _Listening(client_app, num_clients)
        grid.heard = self.heard
        with server_identity(grid.run.run_id):
            return main(grid)


class _Listening(InProcessGrid):
    heard: list[tuple[Message, bytes]]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        messages = list(messages)
        for message in messages:
            self._hear(message)
        for reply in super().send_and_receive(messages):
            self._hear(reply)
            yield reply

    def _hear(self, message: Message) -> None:
        records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
        self.heard.append((message, b"".join(array.data for record in records for array in record.values())))
