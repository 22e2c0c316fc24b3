"""A site's loop: it joins, works when it is asked to, and joins again when the connection is lost."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, MessageType
from flwr.clientapp import ClientApp
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_fed._compat.flower_address import Address, LinkLost, LinkRefuses, LinkStuck, LinkUntrusted, PartsGone
from lightning_fed._compat.flower_node import (
    AHEAD,
    BEHIND,
    NO_STRANGERS,
    NOT_ACTIVATED,
    RUN_OVER,
    Key,
    NodeConnection,
    Received,
    new_key,
)
from lightning_fed.errors import ClientError, ConfigurationError, FederationError
from lightning_fed.site.answers import Answers
from lightning_fed.site.states import StateFolder
from lightning_fed.tracebacks import one_line, words
from lightning_fed.wire import messages, packing, roll_call
from lightning_fed.wire.address import untrusted

# Seconds between two questions whether there is work. To ask sooner would keep the SuperLink from its own.
POLL = 0.25
_CLOCKS = (
    "do both clocks show the same time? A site's may be at most"
    f" {AHEAD} s ahead of the SuperLink's, and {BEHIND} s behind"
)


@dataclass
class Membership:
    """Who a site is, and where it joins.

    Attributes:
        address: The SuperLink.
        client: Which client it is.
        key: Its private key; ``None`` where the SuperLink takes in anybody.
        lease: Seconds for which a place may be taken by a process that is gone.
    """

    address: Address
    client: int
    key: Key | None
    lease: float


class Site:
    """A client that stays: in memory its module and data, on disk what it keeps.

    Args:
        app: What it runs.
        compare: Raises if the site is set up otherwise than a question says.
        member: Who it is.
        states: What it keeps.
    """

    def __init__(
        self, app: ClientApp, compare: Callable[[Message], None], member: Membership, states: StateFolder
    ) -> None:
        self._member, self._states = member, states
        self._answers = Answers(app, compare, member.client, states)
        self._has_joined = False

    def serve(self) -> None:
        """Work until Ctrl-C or SIGTERM.

        Raises:
            ConfigurationError: If the SuperLink does not let it join.
        """
        where = self._member.address.server
        with self._states.locked(), _sigterm_as_ctrl_c():
            try:
                while True:
                    try:
                        self._stay()
                    except (LinkLost, LinkRefuses, LinkUntrusted) as error:
                        if not self._has_joined and not isinstance(error, LinkLost):
                            raise ConfigurationError(self._explain(error)) from error
                        what = "refuses" if isinstance(error, LinkRefuses) else "is not there"
                        clocks = f" Was it restarted without --database? Else: {_CLOCKS}." if _of_clocks(error) else ""
                        rank_zero_warn(f"The SuperLink at {where} {what}, trying again: {error}.{clocks}")
                    time.sleep(1.0)
            except KeyboardInterrupt:
                rank_zero_info(f"Client {self._member.client} leaves {where}.")
                gc.freeze()  # else the process, which is about to end, looks at all its objects again, for a second

    def _stay(self) -> None:
        """Join, and work as long as the connection holds."""
        connection = NodeConnection(self._member.address, self._member.key or new_key())
        clean = False
        try:
            self._join(connection)
            self._states.came(connection.node_id)
            waiting = deque[Received]()
            while not connection.is_lost:
                self._pull(connection, waiting)
                if waiting:
                    self._work(connection, waiting.popleft())
                else:
                    time.sleep(POLL)
        except KeyboardInterrupt:
            clean = True
            raise
        finally:
            connection.close(forget=self._member.key is None)
            if clean:
                self._states.left()

    def _join(self, connection: NodeConnection) -> None:
        member, left_behind = self._member, 0
        if member.key is None:
            connection.register()
        else:
            left_behind = self._states.left_behind()
        until, said = time.monotonic() + member.lease, False
        while True:
            try:
                connection.activate(left_behind)
                break
            except LinkRefuses as error:
                if error.code != NOT_ACTIVATED or (time.monotonic() > until and not self._has_joined):
                    raise
            if not said:
                rank_zero_warn(
                    f"The SuperLink at {member.address.server} does not take this key yet: nobody has registered it"
                    " there, or somebody with the same key is, or was, there within the last minute. Trying for"
                    f" {member.lease:g} s."
                )
                said = True
            time.sleep(1.0)
        self._has_joined = True
        rank_zero_info(f"Client {member.client} has joined {member.address.server} as node {connection.node_id}.")

    def _pull(self, connection: NodeConnection, waiting: deque[Received]) -> None:
        """Take in what is there for this site, but for what the server has given up while the site was busy."""
        while (received := self._next(connection)) is not None:
            for earlier in [one for one in waiting if roll_call.is_overtaken(one.group, received.group)]:
                waiting.remove(earlier)
                mark, _, _ = earlier.group.partition("/")
                rank_zero_info(f"Client {self._member.client} leaves {mark} out: the server has gone on.")
            waiting.append(received)

    def _next(self, connection: NodeConnection) -> Received | None:
        try:
            return connection.next()
        except ConnectionError:
            raise
        except Exception as error:
            self._say_unreadable(error)
            return None

    def _work(self, connection: NodeConnection, received: Received) -> None:
        """Answer a message; one that cannot be read costs that message, and no more."""
        try:
            self._serve_one(connection, received)
        except LinkRefuses as error:
            if error.code == RUN_OVER:
                rank_zero_info(f"Client {self._member.client}: the run is over at the server, its work is dropped.")
                return
            if error.status != 401 and received.bare.metadata.message_type != MessageType.QUERY:
                self._say_refused(connection, received, error)
            raise  # where the site comes anew it is asked, and sent its work, again
        except ConnectionError:
            raise
        except Exception as error:
            said = self._say_unreadable(error)
            with suppress(Exception):  # what cannot be answered either is dropped
                refusal = messages.error_reply(
                    received.bare, ClientError(f"cannot read or answer this message: {said}")
                )
                self._again(connection, lambda: connection.send(refusal, 0.0))

    def _say_refused(self, connection: NodeConnection, received: Received, error: LinkRefuses) -> None:
        """Tell the server, if that is not refused, too, that its work or the reply does not get through."""
        said = ClientError(f"cannot be sent its work, or send its reply: {error}")
        with suppress(LinkRefuses):
            self._again(connection, lambda: connection.send(messages.error_reply(received.bare, said), 0.0))
            # The SuperLink takes no second reply where it has begun to take the first.
            self._answers.give_up(received.group.partition("/")[0], said)

    def _serve_one(self, connection: NodeConnection, received: Received) -> None:
        traffic = connection.traffic
        came, went, began = traffic.received, traffic.sent, time.monotonic()
        message = self._again(connection, lambda: connection.fetch(received))
        if message is None:
            return
        at = time.monotonic()
        reply = self._answers.to(message, connection.node_id)
        seconds, round = time.monotonic() - at, roll_call.round_of(message)
        is_work = message.metadata.message_type != MessageType.QUERY
        examples = 0 if reply.has_error() else messages.num_examples(reply)
        if is_work and not reply.has_error():
            reply.content = packing.Packer().pack(reply.content, is_reply=True, apart={roll_call.KEPT})
        self._again(connection, lambda: connection.send(reply, seconds))
        what = f"Round {round}, {one_line(reply.metadata.message_type)}"
        if reply.has_error():
            said, exception = messages.raised(reply)
            said = str(exception) if isinstance(exception, FederationError) else said
            rank_zero_warn(f"{what}: client {self._member.client} failed: {said}")
        elif is_work:
            rank_zero_info(
                f"{what}: {examples:,.0f} examples in {time.monotonic() - began:.1f} s,"
                f" {traffic.received - came:,} bytes received, {traffic.sent - went:,} sent."
            )

    def _again(self, connection: NodeConnection, do: Callable[[], Any]) -> Any:
        """Do something, again where the SuperLink does not answer; ``None`` if it has forgotten site or message."""
        said = False
        while not connection.is_lost:
            try:
                return do()
            except PartsGone:
                break
            except LinkStuck:
                raise  # where the site comes anew it is sent its work again, and has the reply
            except LinkLost as error:
                if not said:
                    rank_zero_warn(f"The SuperLink does not answer, trying again: {error}")
                    said = True
                time.sleep(1.0)
        return None

    def _say_unreadable(self, error: Exception) -> str:
        said = one_line(words(error))
        rank_zero_warn(f"Client {self._member.client} cannot read or answer a message: {said}")
        return said

    def _explain(self, error: Exception) -> str:
        member = self._member
        how = f"join({member.address.server!r}, client={member.client})"
        if isinstance(error, LinkUntrusted):
            return f"{how}: {untrusted(error)}"
        assert isinstance(error, LinkRefuses)
        if error.code == NO_STRANGERS:
            return (
                f"{how}: the SuperLink takes in registered sites only ({error}). Write private_key= with this site's"
                " key, whose public half was registered there: `flwr supernode register KEY.pub CONNECTION`."
            )
        if error.code == NOT_ACTIVATED:
            return (
                f"{how}: the SuperLink does not take this key ({error}). Either nobody has registered its public half"
                " there, `flwr supernode register KEY.pub CONNECTION`, or another site is there with the same key."
            )
        if _of_clocks(error):
            return f"{how}: {_CLOCKS}. The SuperLink refuses: {error}"
        return f"{how}: the SuperLink refuses: {error}"


def _of_clocks(error: Exception) -> bool:
    return isinstance(error, LinkRefuses) and error.status == 401


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
