"""A Grid over the sites behind a SuperLink.

To the loop a client has one address for the whole run, as in process; where its site is at the moment is this file's
business, and a site that comes back within the round is sent its work again. Replies come in the order of the messages,
so that all sums are those of one process, bit for bit.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import Message, RecordDict
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed._compat.flower_address import LinkLost, LinkRefuses
from lightning_fed._compat.flower_server import RUN_GONE, ServedRun
from lightning_fed.engines.base import ClientGrid
from lightning_fed.engines.members import Members
from lightning_fed.engines.superlink_work import SiteDelivery, Work
from lightning_fed.errors import ConfigurationError, FederationError
from lightning_fed.wire import roll_call
from lightning_fed.wire.kept_file import Marks

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds.

    Attributes:
        connect: For the clients at the start, and for a SuperLink that does not answer.
        back: For a site that was lost in a round to come back.
    """

    connect: float
    back: float


class SuperLinkGrid(ClientGrid):
    """See above.

    Args:
        run: The run that this process serves.
        num_clients: Tells the number of clients.
        least: How many have to be here when the run begins; ``None`` for all.
        patience: How long to wait.
        max_reply_bytes: How many bytes a reply may have; ``None`` for a limit by the weights.

    Attributes:
        outages: How often the SuperLink has not answered for a while.
    """

    def __init__(
        self,
        run: ServedRun,
        num_clients: Callable[[], int],
        least: int | None,
        patience: Patience,
        max_reply_bytes: int | None = None,
    ) -> None:
        super().__init__(run.run, num_clients)
        self.served, self.patience, self._least, self.max_reply_bytes = run, patience, least, max_reply_bytes
        self._key = _new_key()
        self._asked: set[tuple[int, int, str]] = set()
        self._members: Members | None = None
        self._marks = Marks()
        self._pushed: dict[str, Work] = {}
        self.outages = 0

    @property
    def members(self) -> Members:
        """Who is here."""
        if self._members is None:
            self._members = Members(self.served, self.num_clients, roll_call.question({}, 0))
        return self._members

    def gather(self, question: Callable[[], RecordDict]) -> None:
        """See ``ClientGrid``.

        Raises:
            ConfigurationError: If too few come in time, or one is set up otherwise.
        """
        total, least = self.num_clients, self._least or self.num_clients
        if least > total:
            raise ConfigurationError(f"SuperLink(min_clients={least}): there are {total} clients.")
        self._members = Members(self.served, total, question())
        self.patiently(lambda: self.members.wait(least, self.patience.connect))

    def begin_round(self) -> None:
        """See ``ClientGrid``."""
        self._marks.begin_round()

    def undo(self, client: int) -> None:
        """See ``ClientGrid``."""
        self._marks.undo(client)

    def client_states(self, *, before_round: bool = False) -> dict[int, RecordDict]:
        """See ``ClientGrid``: where on their own disks clients have what they keep."""
        marks = self._marks.saved(before_round=before_round)
        return {client: roll_call.as_state(mark) for client, mark in marks.items()}

    def load_client_states(self, states: dict[int, RecordDict]) -> None:
        """See ``ClientGrid``."""
        for client, state in states.items():
            if (mark := roll_call.from_state(state)) is not None:
                self._marks.now[client] = mark
            elif state:
                raise ConfigurationError(
                    f"What client {client} keeps is in the checkpoint, for it was in the server's process: sites keep"
                    " what is theirs on their own disks, and cannot take it. Go on with the engine that the run had."
                )

    def kept_by(self, client: int, message: Message) -> roll_call.WorkMarks:
        """Return the marks of what a client's work begins with and leaves."""
        mark = roll_call.mark_of(self._key, roll_call.round_of(message), message.metadata.message_type)
        return roll_call.WorkMarks(self._marks.now.get(client, ""), mark)

    def keep(self, client: int, mark: str) -> None:
        """Remember that a client keeps something of a piece of work."""
        self._marks.now[client] = mark

    def patiently(self, do: Callable[[], T]) -> T:
        """Do something at the SuperLink, again and again where it does not answer.

        Raises:
            FederationError: If it does not answer for too long, or does not know the run any more.
        """
        until, said = time.monotonic() + self.patience.connect, False
        while True:
            if self.served.is_stopped:
                raise FederationError("The run was stopped at the SuperLink: by `flwr stop`, or by another server.")
            try:
                done = do()
                self.outages += said
                return done
            except LinkRefuses as error:
                if error.code not in RUN_GONE:
                    raise FederationError(f"The SuperLink, or a proxy before it, refuses: {error}") from error
                raise FederationError(
                    f"The SuperLink does not know this run any more ({error}). It was stopped, or the SuperLink was"
                    " restarted without --database: go on with fit(ckpt_path='last')."
                ) from error
            except LinkLost as error:
                if time.monotonic() > until:
                    raise FederationError(
                        f"The SuperLink has not answered for {self.patience.connect:g} s: {error}"
                    ) from error
                if not said:
                    rank_zero_warn(f"The SuperLink does not answer, trying again: {error}")
                    said = True
                time.sleep(1.0)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Give the replies in the order of the messages, each as soon as it and those before it are there."""
        return SiteDelivery(self, self._works(messages), timeout).replies()

    def _works(self, messages: Iterable[Message]) -> list[Work]:
        works = [Work(self.client_of(message.metadata.dst_node_id), message) for message in messages]
        asked = {(work.client, roll_call.round_of(work.message), work.message.metadata.message_type) for work in works}
        if not asked.isdisjoint(self._asked):  # who sends twice in one round gets other marks, for it is other work
            self._key, self._asked = _new_key(), set()
        self._asked |= asked
        return works

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; ``pull_messages`` takes what this gives."""
        works = {uuid.uuid4().hex: work for work in self._works(messages)}
        self._pushed.update(works)
        delivery = SiteDelivery(self, list(works.values()), None)
        self.patiently(lambda: delivery.turn(0))
        return list(works)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to pushed messages, each once."""
        waiting = {key: self._pushed[key] for key in message_ids if key in self._pushed}
        delivery, replies = SiteDelivery(self, list(waiting.values()), None), []
        self.patiently(lambda: delivery.turn(0))
        for key, work in waiting.items():
            if work.reply is not None:
                del self._pushed[key]
                replies.append(work.reply)
        return replies


def _new_key() -> str:
    return uuid.uuid4().hex[:16]
