"""The in-process engine: a Grid that calls the client app directly, one client after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from flwr.app import Context, Message, Metadata, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from lightning_fed._compat.flower import make_message, new_run, number, server_identity
from lightning_fed.engines.base import Engine, LocalGrid
from lightning_fed.engines.client_states import StatesInFiles, StatesInMemory
from lightning_fed.engines.served import answer, served
from lightning_fed.wire import messages, roll_call

T = TypeVar("T")


class InProcess(Engine):
    """Runs every client in this process and thread. The cost of a round does not depend on the population."""

    name = "in_process"
    uses_first_device = True

    def run(self, main: Callable[[Grid], T], client_app: ClientApp, num_clients: Callable[[], int]) -> T:
        """See ``Engine``."""
        grid = InProcessGrid(client_app, num_clients)
        with server_identity(grid.run.run_id):
            return main(grid)


def deliver(metadata: Metadata, content: RecordDict) -> Message:
    """Return a message as it reaches a client, with records of its own that the client may write to."""
    return make_message(metadata=metadata, content=messages.copy_for_delivery(content))


class InProcessGrid(LocalGrid):
    """A Grid over clients in this process; what a client keeps lives as long as the grid, or in files."""

    def __init__(self, client_app: ClientApp, num_clients: Callable[[], int]) -> None:
        super().__init__(new_run(), num_clients)
        self.app = served(client_app)
        self._states = StatesInMemory()
        self._replies: dict[str, Message] = {}

    def keep_in(self, folder: Path) -> None:
        """See ``LocalGrid``."""
        self._states = StatesInFiles(folder)

    def begin_round(self) -> None:
        """See ``LocalGrid``."""
        self._states.begin_round()

    def undo(self, client: int) -> None:
        """See ``LocalGrid``."""
        self._states.undo(client)

    def client_states(self, *, before_round: bool = False) -> dict[int, RecordDict]:
        """See ``LocalGrid``."""
        return self._states.save(before_round=before_round)

    def saved_at(self, path: str) -> None:
        """See ``ClientGrid``."""
        self._states.saved_at(path)

    def load_client_states(self, states: dict[int, RecordDict]) -> None:
        """See ``LocalGrid``.

        Raises:
            ConfigurationError: If a client has its state somewhere else.
        """
        self._states.load(states)

    def state_of(self, client: int, *, before_round: bool = False) -> RecordDict:
        """See ``LocalGrid``."""
        return self._states.read_before(client) if before_round else self._states.read(client)

    def _context_of(self, message: Message) -> Context:
        """Return the context of the client that a message is for; ``_keep`` takes back what becomes of its state."""
        client = self.client_of(message.metadata.dst_node_id)
        config: UserConfig = {messages.CLIENT: client, "num-partitions": self.num_clients}
        return Context(self.run.run_id, self.node_of(client), config, self._states.take(client), {})

    def _keep(self, message: Message, state: RecordDict) -> None:
        of = message.metadata
        self._states.put(self.client_of(of.dst_node_id), state, roll_call.round_of(message), of.message_type)

    def _call(self, sent: Sequence[Message]) -> list[Message]:
        contexts = [self._context_of(message) for message in sent]
        delivered = [deliver(message.metadata, message.content) for message in sent]
        replies = answer(self.app, list(zip(delivered, contexts, strict=True)))
        for message, context in zip(sent, contexts, strict=True):
            self._keep(message, context.state)
        for reply in replies:
            number(reply)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Run the clients as the replies are read, in the order of the messages; nothing to time out on."""
        waiting = iter(messages)
        for first in waiting:
            together = [first, *islice(waiting, self.app.max_messages(first.metadata.message_type) - 1)]
            for message in together:
                number(message)
            replies = self._call(together)
            while replies:  # each is released before the next is read
                yield replies.pop(0)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the clients now and keep their replies for ``pull_messages``."""
        replies = list(self.send_and_receive(messages))
        self._replies.update({reply.metadata.reply_to_message_id: reply for reply in replies})
        return [reply.metadata.reply_to_message_id for reply in replies]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to pushed messages, each once."""
        return [self._replies.pop(key) for key in list(message_ids) if key in self._replies]
