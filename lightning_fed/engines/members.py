"""Who is behind a SuperLink: which client is at which node, asked of each node once."""

from __future__ import annotations

import time
from typing import NamedTuple

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_fed._compat.flower_server import ReplyUnderWay, ServedRun
from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.tracebacks import one_line, words
from lightning_fed.wire import messages, roll_call

_OWN = f"{ClientError.__module__}.{ClientError.__qualname__}: "
# Seconds between two looks at the nodes.
LOOK = 1.0
# Seconds that a node has to say who it is, before nobody waits for its answer: it may be busy for an earlier run.
ANSWER = 15.0
# Bytes that the answer may have.
ANSWER_BYTES = 1 << 20


class Place(NamedTuple):
    """A node as it is since its site last came.

    Attributes:
        since: When it came, as Flower tells it: later is greater.
        node_id: Flower's address.
    """

    since: str
    node_id: int


class Asked(NamedTuple):
    """A question on its way.

    Attributes:
        place: Who is asked.
        at: When.
        group: The ``group_id`` that the answer has to have.
    """

    place: Place
    at: float
    group: str


class Refusal(NamedTuple):
    """Why the site at a node cannot be a client of this run.

    Attributes:
        why: A sentence, with what the site says of it: one line, cut.
        is_mistake: Whether it looks like a client of this run that is set up otherwise, and not like a stranger.
    """

    why: str
    is_mistake: bool


class Members:
    """The sites of a run as they come and go.

    Args:
        run: The run.
        num_clients: How many clients there are.
        question: What a node is asked when it comes.
    """

    def __init__(self, run: ServedRun, num_clients: int, question: RecordDict) -> None:
        self._run, self._num_clients, self._question = run, num_clients, question
        self._asked: dict[str, Asked] = {}
        self._coming: dict[str, ReplyUnderWay] = {}  # the answers of which parts are missing
        self._said: dict[Place, int | None] = {}  # by place its client; None where that is not known, or it is refused
        self._here: dict[int, Place] = {}
        self._seen: dict[int, float] = dict.fromkeys(range(num_clients), time.monotonic())
        self._owners: dict[int, int] = {}  # the first node that was a client, by client
        self._names: dict[int, str] = {}
        self._twice: set[tuple[Place, Place]] = set()
        self._looked = 0.0
        self._refused: dict[Place, Refusal] = {}

    def place_of(self, client: int) -> Place | None:
        """Return where a client is, or ``None``."""
        return self._here.get(client)

    def missing(self) -> list[int]:
        """Return the clients that are not here."""
        return [client for client in range(self._num_clients) if client not in self._here]

    def absent(self, client: int) -> float:
        """Return for how many seconds a client has not been here."""
        return 0.0 if client in self._here else time.monotonic() - self._seen[client]

    def is_lost(self, client: int, seconds: float) -> bool:
        """Return whether a client has not been here for so long, and none of those that just came can be it."""
        if self.absent(client) <= seconds:
            return False
        now = time.monotonic()
        return all(now - asked > ANSWER for _, asked, _ in self._asked.values())

    def look(self, *, at_once: bool = False) -> None:
        """Look who is there, unless that was done just now."""
        if not at_once and time.monotonic() < self._looked + LOOK:
            return
        nodes = self._run.nodes()
        self._names.update({node.node_id: node.name for node in nodes if node.name})
        places = [Place(node.last_activated_at or "", node.node_id) for node in nodes]
        self._ask([place for place in places if place not in self._said])
        self._hear()
        self._looked = now = time.monotonic()
        self._seen.update(dict.fromkeys(self._here, now))
        self._refused = {place: refusal for place, refusal in self._refused.items() if place in places}
        here: dict[int, Place] = {}
        for place in sorted(places):  # the one that came last counts
            if (client := self._said.get(place)) is not None and self._owns(place, client):
                self._say_of_two(client, here.get(client), place)
                here[client] = place
        for client in sorted(self._here.keys() - here.keys()):
            rank_zero_info(f"Client {client} has left.")
        self._here = here

    def _owns(self, place: Place, client: int) -> bool:
        """Return whether a client may be at a node; where nodes are known by their keys, it is the first's that was it.

        Without, a site that was started again has a new key, and is another node to Flower.
        """
        owner = self._owners.setdefault(client, place.node_id)
        if owner == place.node_id or self._run.admits_strangers:
            return True
        self._said[place] = None
        self._refuse(
            place,
            Refusal(f"says that it is client {client}, which {self._called(owner)}, with another key, is.", False),
        )
        return False

    def _called(self, node_id: int) -> str:
        name = self._names.get(node_id)
        return f"node {node_id} ({one_line(name, 60)})" if name else f"node {node_id}"

    def _say_of_two(self, client: int, earlier: Place | None, later: Place) -> None:
        """Say once that a client is at two nodes; the first may be of a process that is gone."""
        if earlier is not None and (earlier, later) not in self._twice:
            self._twice.add((earlier, later))
            rank_zero_warn(
                f"Client {client} is at two nodes, {earlier.node_id} and {later.node_id}. The one that came last"
                f" counts; if the first is not of a process that has just ended, two sites say client={client}."
            )

    def _ask(self, places: list[Place]) -> None:
        for place in places:
            question = Message(self._question, place.node_id, MessageType.QUERY, group_id=roll_call.group_of())
            [name] = self._run.push([question])
            if name:  # else it has gone meanwhile
                self._asked[name] = Asked(place, time.monotonic(), question.metadata.group_id)
                self._said[place] = None

    def _hear(self) -> None:
        if asked := list(self._asked.keys() - self._coming.keys()):
            self._coming.update(self._run.pull(asked, ANSWER_BYTES))
        for name, coming in list(self._coming.items()):
            if (reply := coming.take()) is None:
                continue
            del self._coming[name]
            place, _, group = self._asked.pop(name)
            if coming.group != group or roll_call.is_lost(reply):
                self._said.pop(place, None)  # if it is still there, it is asked again
            elif isinstance(said := self._read(reply), Refusal):
                self._refuse(place, said)
            else:
                self._said[place] = said

    def _refuse(self, place: Place, refusal: Refusal) -> None:
        """Say and note why a site cannot be a client of this run."""
        self._refused[place] = refusal = refusal._replace(
            why=f"The site at {self._called(place.node_id)} {refusal.why}"
        )
        rank_zero_warn(refusal.why)

    def _read(self, reply: Message | Exception) -> int | Refusal:
        """Return which client a site says that it is; what it sends can be anything."""
        try:
            if isinstance(reply, Exception):
                raise reply
            if reply.has_error():
                said = messages.raised(reply)[0].partition(messages.TRACEBACK)[0]
                return Refusal(f"cannot take part: {one_line(said.removeprefix(_OWN))}", is_mistake=True)
            client = (messages.first(reply.content, ConfigRecord) or ConfigRecord()).get(messages.CLIENT)
        except Exception as error:
            return Refusal(f"gives an answer that cannot be read: {one_line(words(error))}", is_mistake=False)
        if type(client) is int and 0 <= client < self._num_clients:
            return client
        return Refusal(
            f"says that it is client {one_line(repr(client))}, and the run has clients 0 to {self._num_clients - 1}.",
            is_mistake=type(client) is int and client > 0,
        )

    def wait(self, least: int, seconds: float) -> None:
        """Wait until so many clients are here, and say for whom.

        Raises:
            ConfigurationError: If they are not within so many seconds, or if as many sites as are missing have come and
                were refused for what looks like a mistake: nobody else is to come.
        """
        began, said, total = time.monotonic(), None, self._num_clients
        while True:
            self.look()
            missing, waited = self.missing(), time.monotonic() - began
            if total - len(missing) >= least:
                return
            who = f"client{'' if len(missing) == 1 else 's'} {', '.join(map(str, missing))}"
            state = f"{total - len(missing)} of {total} clients are here: waiting for {who}"
            mistakes = [refusal.why for refusal in self._refused.values() if refusal.is_mistake]
            if len(mistakes) >= len(missing):
                raise ConfigurationError(_listed(mistakes))
            if waited > seconds:
                raise ConfigurationError(
                    f"{state}, for {seconds:g} s by now. Each site runs trainer.join(address, model, client=k); with"
                    " SuperLink(min_clients=...) the run begins with fewer, and with SuperLink(connect_timeout=...) it"
                    f" waits longer. {_listed([refusal.why for refusal in self._refused.values()])}".rstrip()
                )
            if waited > LOOK and state != said:
                rank_zero_info(state)
                said = state
            time.sleep(0.1)


def _listed(refusals: list[str]) -> str:
    more = [f"And {len(refusals) - 3} more."] if len(refusals) > 3 else []
    return " ".join([*refusals[:3], *more])
