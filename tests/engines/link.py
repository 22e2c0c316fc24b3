"""A SuperLink in memory, in place of the server's side of a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from lightning_fed._compat.flower import make_message, new_run, server_identity
from lightning_fed._compat.flower_address import LinkLost
from lightning_fed.engines import Engine
from lightning_fed.engines.superlink_grid import Patience, SuperLinkGrid
from lightning_fed.wire import messages
from tests.helpers import over_the_wire

T = TypeVar("T")
Site = Callable[[Message], Message | None]


@dataclass
class Came:
    """A reply that is here, or ``None`` for one of which parts are missing."""

    reply: Message | Exception | None
    group: str

    def take(self) -> Message | Exception | None:
        return self.reply


class Link:
    """What the grid knows of a SuperLink.

    Args:
        sites: By node what its site makes of a message: a reply, or ``None`` where it gives none.

    Attributes:
        away: How many calls from now on are not answered.
        stalls: Nodes whose replies begin to come, and never end.
        forgets: Nodes whose next work is marked as delivered, and never gets there.
        sent: All messages that were sent to nodes.
    """

    is_stopped = False
    admits_strangers = True

    def __init__(self, sites: dict[int, Site]) -> None:
        self.run, self.sites = new_run(), sites
        self.since = dict.fromkeys(sites, "2026-01-01")
        self.away, self.forgets, self.stalls = 0, set[int](), set[int]()
        self.sent: list[Message] = []
        self.most: list[float] = []
        self._waiting: list[str] = []
        self._replies: dict[str, Message] = {}

    def _answer(self) -> None:
        if self.away:
            self.away -= 1
            raise LinkLost("away")

    def nodes(self) -> list[Any]:
        self._answer()
        return [SimpleNamespace(node_id=node, last_activated_at=since, name="") for node, since in self.since.items()]

    def push(self, sent: Sequence[Message]) -> list[str]:
        self._answer()
        names = [f"m{len(self.sent) + i}" for i in range(len(sent))]
        for name, message in zip(names, sent, strict=True):
            message.metadata.__dict__["_message_id"] = name
        self.sent += sent
        self._waiting += names
        return names

    def pull(self, names: Sequence[str], most: float) -> Iterator[tuple[str, Any]]:
        self._answer()
        self.most.append(most)
        self._deliver()
        for name in [name for name in names if name in self._replies]:
            of = self.sent[int(name[1:])].metadata
            stalls = of.dst_node_id in self.stalls and of.message_type != MessageType.QUERY
            reply = None if stalls else self._replies.pop(name)
            yield name, Came(reply, reply.metadata.group_id if reply else of.group_id)

    def _deliver(self) -> None:
        waiting, self._waiting = self._waiting, []
        for name in waiting:
            message = self.sent[int(name[1:])]
            node = message.metadata.dst_node_id
            if node in self.forgets and message.metadata.message_type != MessageType.QUERY:
                self.forgets.discard(node)
            elif (reply := self.sites[node](_arrived(message))) is not None:
                self._replies[name] = _arrived(reply)

    def works(self, node: int) -> int:
        """How often a node was sent work."""
        return sum(m.metadata.dst_node_id == node and m.metadata.message_type != MessageType.QUERY for m in self.sent)


def _arrived(message: Message) -> Message:
    if message.has_error():
        return message
    return make_message(metadata=message.metadata, content=over_the_wire(message.content))


def site_of(client: int, work: Callable[[Message], Message | None]) -> Site:
    """A site that says which client it is, and does its work."""

    def site(message: Message) -> Message | None:
        if message.metadata.message_type != MessageType.QUERY:
            return work(message)
        return Message(RecordDict({messages.CONFIG: ConfigRecord({messages.CLIENT: client})}), reply_to=message)

    return site


class Linked(Engine):
    """The network engine over a SuperLink in memory."""

    name = "superlink"
    can_vectorize = False

    def __init__(self, link: Link, patience: Patience = Patience(5.0, 5.0)) -> None:
        self.link, self.patience = link, patience

    def run(self, main: Callable[[Grid], T], client_app: ClientApp, num_clients: Callable[[], int]) -> T:
        with server_identity(self.link.run.run_id):
            return main(SuperLinkGrid(self.link, num_clients, None, self.patience))  # type: ignore[arg-type]
