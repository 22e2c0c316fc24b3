"""Who is behind Flower's addresses, and what of the grid a strategy sees."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_fed.errors import ConfigurationError
from lightning_fed.tracebacks import one_line
from lightning_fed.wire import messages


class Roster(Protocol):
    """Which client is behind which of Flower's addresses. Our own grids are rosters themselves."""

    @property
    def num_clients(self) -> int: ...
    def node_of(self, client: int) -> int: ...
    def client_of(self, node_id: int) -> int: ...


class CohortGrid(Grid):
    """What a strategy sees of the grid: the cohort, in client order."""

    def __init__(self, grid: Grid, node_ids: Sequence[int]) -> None:
        self._grid, self._node_ids = grid, node_ids
        self._asked, self._since = 0, 0.0

    def get_node_ids(self) -> Iterable[int]:
        """Return the cohort's addresses.

        Raises:
            ConfigurationError: If a strategy waits for more clients than the cohort has; it would wait for ever.
        """
        # Flower's way to wait is to ask again and again, with a second's sleep between.
        self._asked += 1
        self._since = self._since or time.monotonic()
        if self._asked > 3 and time.monotonic() - self._since > 1.9:
            raise ConfigurationError(
                f"The strategy waits for more clients than take part in the round: {len(self._node_ids)}. Lower its"
                " min_train_nodes, min_evaluate_nodes and min_available_nodes (Flower's default is 2 each), or raise"
                " the number of clients."
            )
        return list(self._node_ids)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Do as the grid below."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Do as the grid below."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Do as the grid below."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Do as the grid below."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def set_run(self, run: Any) -> None:
        """Do as the grid below."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Do as the grid below."""
        return self._grid.run


class RollCall:
    """A roster for a grid that is not ours: every node is asked once which client it is.

    Args:
        grid: The grid.
        timeout: Seconds to wait for nodes, and for their answers.
        least: How many have to be there.
        clients: How many clients the run has, where that is known: nodes that say they are others are left out.

    Raises:
        ConfigurationError: If too few nodes connect in time, one does not say which client it is, or two say the same.
    """

    def __init__(self, grid: Grid, timeout: float, least: int, clients: int | None = None) -> None:
        nodes = self._wait(grid, timeout, least)
        asked = [Message(RecordDict(), node_id, MessageType.QUERY) for node_id in nodes]
        replies = grid.send_and_receive(asked, timeout=timeout)
        said = {reply.metadata.src_node_id: _client_of(reply) for reply in replies}
        surplus = [node_id for node_id, client in said.items() if clients is not None and client >= clients]
        self._client_of = {node_id: client for node_id, client in said.items() if node_id not in surplus}
        self._node_of = {client: node_id for node_id, client in self._client_of.items()}
        count = max(least, len(nodes) - len(surplus))
        has = "" if clients is None else f", and the run has {clients}"
        say = f"{len(nodes)} nodes say they are clients {sorted(said.values())}{has}"
        if sorted(self._node_of) != list(range(count)):
            last = max(least, min(count, clients or count)) - 1
            raise ConfigurationError(
                f"{say}: give them the {messages.CLIENT} 0 to {last} in their node config, each once."
            )
        if surplus:
            rank_zero_warn(f"{say}: those beyond are left out, node {', '.join(map(str, surplus))}.")

    @staticmethod
    def _wait(grid: Grid, timeout: float, least: int) -> list[int]:
        until, said = time.monotonic() + timeout, -1
        while len(nodes := list(grid.get_node_ids())) < least:
            if time.monotonic() > until:
                raise ConfigurationError(
                    f"{len(nodes)} clients connected within {timeout:g} s; {least} are needed. Start the others, or"
                    " write PartialParticipation(min_available_clients=...) for fewer."
                )
            if len(nodes) != said:
                said = len(nodes)
                rank_zero_info(f"{said} of {least} clients are here: waiting for the others")
            time.sleep(0.2)
        return nodes

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return len(self._client_of)

    def node_of(self, client: int) -> int:
        """Return Flower's address of a client."""
        return self._node_of[client]

    def client_of(self, node_id: int) -> int:
        """Return the client at one of Flower's addresses."""
        return self._client_of[node_id]


def _client_of(reply: Message) -> int:
    if reply.has_error():
        raise ConfigurationError(f"A client did not say who it is: {one_line(messages.raised(reply)[0])}")
    client = (messages.first(reply.content, ConfigRecord) or ConfigRecord()).get(messages.CLIENT)
    if type(client) is not int:
        raise ConfigurationError(
            f"The node {reply.metadata.src_node_id} says that it is client {one_line(repr(client))}: give it a"
            f" {messages.CLIENT} from 0 in its node config."
        )
    return client
