"""Work for sites over a SuperLink in memory: what comes when the time is over, what is sent again after an outage."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_fed._compat.flower_address import Address, LinkLost, LinkRefuses, PartsGone
from lightning_fed._compat.flower_server import RUN_GONE, ReplyUnderWay
from lightning_fed.engines import superlink_grid
from lightning_fed.engines.members import ANSWER_BYTES
from lightning_fed.engines.superlink_work import BESIDE
from lightning_fed.errors import FederationError
from lightning_fed.testing import counting_client, toy_weights
from lightning_fed.wire import messages, packing, roll_call
from lightning_fed.wire.messages import CLIENT
from tests.engines.clients import train_messages
from tests.engines.link import Link, Linked, Site, site_of


def counting(client: int, first: Callable[[], Any] = lambda: None) -> Site:
    """A site that does something, and then its work unless that was ``False``."""
    app, config = counting_client(), {CLIENT: client}

    def work(message: Message) -> Message | None:
        if first() is False:
            return None
        packing.unpack_content(message.content)
        roll_call.take_kept(message.content)
        return app(message, Context(1, 1, config, RecordDict(), {}))

    return site_of(client, work)


def hangs() -> bool:
    return False


def link_of(clients: int, **first: Callable[[], Any]) -> Link:
    """A SuperLink at whose node ``11 + k`` is client ``k``; ``client_2=act`` says what that one does first."""
    return Link({11 + k: counting(k, first.get(f"client_{k}", lambda: None)) for k in range(clients)})


def who(link: Link, clients: int, timeout: float | None = None, rounds: int = 1) -> list[list[int]]:
    """For each round, which clients replied, in their order."""

    def main(grid: Any) -> list[list[int]]:
        return [
            [
                grid.client_of(r.metadata.src_node_id)
                for r in grid.send_and_receive(train_messages(grid), timeout=timeout)
            ]
            for _ in range(rounds)
        ]

    return Linked(link).run(main, ClientApp(), lambda: clients)


def test_replies_that_are_there_when_the_time_is_over_count_whoever_hangs_before_them() -> None:
    link, start = link_of(12, client_0=hangs, client_6=hangs), time.monotonic()
    assert who(link, 12, timeout=1.0) == [[1, 2, 3, 4, 5, 7, 8, 9, 10, 11]]
    assert time.monotonic() - start < 5


def test_a_reply_of_which_parts_never_come_holds_up_nobody_and_is_its_clients_failure() -> None:
    link, start = link_of(4), time.monotonic()
    link.stalls = {11}
    assert who(link, 4, timeout=1.0, rounds=2) == [[1, 2, 3]] * 2
    assert time.monotonic() - start < 5
    assert link.works(11) == 2


def test_a_reply_may_have_twice_the_bytes_of_the_weights_and_some_for_metrics() -> None:
    link = link_of(1)
    assert who(link, 1) == [[0]]
    sent = sum(tensor.nbytes for tensor in toy_weights().values())
    assert set(link.most) == {ANSWER_BYTES, BESIDE + 2 * sent}


def test_what_a_site_kept_counts_though_the_rest_of_its_reply_cannot_be_read() -> None:
    def work(message: Message) -> Message:
        content = RecordDict({"lightning-fed.rest": ConfigRecord({"json": "nonsense"})})
        roll_call.say_kept(content)
        return Message(content, reply_to=message)

    def main(grid: Any) -> Any:
        [reply] = grid.send_and_receive(train_messages(grid))
        return reply, grid.client_states()

    reply, states = Linked(Link({11: site_of(0, work)})).run(main, ClientApp(), lambda: 1)
    assert "sent what cannot be read" in reply.error.reason
    assert list(states) == [0]


def forging(times: int, forged: Callable[[Message], Message]) -> Site:
    """Client 0's site, before which a site that was not told the work's group answers so many times."""
    honest, done = counting(0), []

    def work(message: Message) -> Message | None:
        if message.metadata.message_type == "query" or len(done) == times:
            return honest(message)
        done.append(message)
        reply = forged(message)
        reply.metadata.group_id = message.metadata.group_id.partition("/")[0] + "/" + 32 * "0"
        return reply

    return work


FORGED: dict[str, Callable[[Message], Message]] = {
    "weights": lambda message: Message(message.content, reply_to=message),
    "error": lambda message: messages.error_reply(message, ValueError("forged")),
    "a word of Flower's": lambda message: Message(Error(3, "gone"), reply_to=message),
    "nothing": lambda message: Message(RecordDict(), reply_to=message),
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_a_reply_of_a_site_that_does_not_have_the_work_is_left_out(forged: Callable[[Message], Message]) -> None:
    """Flower does not check whose name stands in a reply."""

    def replies(grid: Any) -> list[Message]:
        return list(grid.send_and_receive(train_messages(grid), timeout=20.0))

    link = link_of(2)
    expected = Linked(link_of(2)).run(replies, ClientApp(), lambda: 2)
    link.sites[11] = forging(2, forged)
    with pytest.warns(UserWarning, match="does not have client 0's work has answered it"):
        came = Linked(link).run(replies, ClientApp(), lambda: 2)
    assert link.works(11) == 3
    assert [r.metadata.src_node_id for r in came] == [r.metadata.src_node_id for r in expected]
    assert [r.metadata.group_id for r in came] == [""] * 2
    for mine, theirs in zip(came, expected, strict=True):
        assert mine.content == theirs.content


def test_where_no_other_reply_comes_that_is_said_of_its_client() -> None:
    def replies(grid: Any) -> list[Message]:
        return list(grid.send_and_receive(train_messages(grid), timeout=20.0))

    link = link_of(2)
    link.sites[11] = forging(3, FORGED["weights"])
    with pytest.warns(UserWarning, match="does not have client 0's work"):
        failed, well = Linked(link).run(replies, ClientApp(), lambda: 2)
    assert failed.error.reason.endswith("was sent its work 3 times, and a site that does not have it has answered.")
    assert not well.has_error()


@pytest.mark.parametrize(
    ("group", "said"),
    [
        (None, "was lost 3 times at this work: does its process run out of memory?"),
        ("", "the SuperLink, or somebody in its name, says that it does not have it"),
        ("/" + 32 * "0", "and a site that does not have it has answered"),
    ],
    ids=["of the message", "without a group", "of another"],
)
@pytest.mark.filterwarnings("ignore:A site that does not have")
def test_a_site_is_lost_in_the_superlinks_own_words_alone(group: str | None, said: str) -> None:
    """Its errors have the group of the message, or none where it does not know that."""

    def gone(message: Message) -> Message:
        reply = Message(Error(3, "gone"), reply_to=message)
        reply.metadata.group_id = message.metadata.group_id if group is None else group
        return reply

    def replies(grid: Any) -> list[Message]:
        return list(grid.send_and_receive(train_messages(grid), timeout=20.0))

    link = link_of(2)
    link.sites[11] = site_of(0, gone)
    failed, well = Linked(link).run(replies, ClientApp(), lambda: 2)
    assert said in failed.error.reason
    assert not well.has_error()


def test_nobody_is_given_work_when_the_time_is_over() -> None:
    """Its site would be busy with it in the next round."""
    link = link_of(3, client_0=hangs)
    came, nodes, start = link.since.pop(12), link.nodes, time.monotonic()

    def nodes_later() -> list[Any]:
        if time.monotonic() > start + 1.0:
            link.since[12] = came
        return nodes()

    link.nodes = nodes_later  # type: ignore[method-assign]
    assert who(link, 3, timeout=1.0) == [[2]]
    assert link.works(12) == 0


def test_what_is_sent_twice_in_a_round_has_marks_of_its_own() -> None:
    """By its mark a site knows work that it has done, and gives the same reply again."""
    link = link_of(2)
    assert who(link, 2, rounds=2) == [[0, 1]] * 2
    for message in link.sent:
        packing.unpack_content(message.content)
    marks = [kept.mark for message in link.sent if (kept := roll_call.take_kept(message.content))]
    assert len(marks) == 4
    assert marks[0] == marks[1] != marks[2] == marks[3]


# ------------------------------------------------------------------------------------------------------- SIGTERM


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """Which signals somebody hears who listens already, as Lightning does in a fit."""
    signals: list[int] = []

    def hear(number: int, frame: Any) -> None:
        signals.append(number)

    before = signal.signal(signal.SIGTERM, hear)
    yield signals
    assert signal.getsignal(signal.SIGTERM) is hear
    signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_a_wait_for_replies_at_once(heard: list[int]) -> None:
    start = time.monotonic()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SIGTERMException):
        who(link_of(3, client_0=hangs), 3, timeout=60.0)
    assert time.monotonic() - start < 5
    assert heard == [signal.SIGTERM]


def test_sigterm_while_a_reply_is_worked_on_ends_the_next_wait(heard: list[int]) -> None:
    def main(grid: Any) -> None:
        for _ in grid.send_and_receive(train_messages(grid), timeout=60.0):
            signal.raise_signal(signal.SIGTERM)

    start = time.monotonic()
    with pytest.raises(SIGTERMException):
        Linked(link_of(2, client_1=hangs)).run(main, ClientApp(), lambda: 2)
    assert time.monotonic() - start < 5
    assert heard == [signal.SIGTERM]


# ------------------------------------------------------------------------------------------------------- outages


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SuperLink that does not answer is asked again at once."""
    monkeypatch.setattr(superlink_grid, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None))


def test_work_that_was_marked_as_delivered_and_never_got_there_is_sent_again_after_an_outage() -> None:
    def the_link_dies() -> None:
        if link.works(12) == 1:
            link.away = 2

    link = link_of(3, client_0=the_link_dies)
    link.forgets.add(12)
    assert who(link, 3, timeout=20.0, rounds=2) == [[0, 1, 2]] * 2
    assert [link.works(node) for node in (11, 12, 13)] == [2, 3, 2]


def test_it_is_sent_again_where_the_site_alone_noticed_and_joined_again() -> None:
    def the_site_joins_again() -> None:
        link.since[12] = "2026-01-02"

    link = link_of(3, client_2=the_site_joins_again)
    link.forgets.add(12)
    assert who(link, 3, timeout=20.0, rounds=2) == [[0, 1, 2]] * 2
    assert [link.works(node) for node in (11, 12, 13)] == [2, 3, 2]


def test_where_nobody_noticed_it_is_a_client_that_does_not_reply_in_time() -> None:
    link = link_of(3)
    link.forgets.add(12)
    assert who(link, 3, timeout=1.0, rounds=2) == [[0, 2], [0, 1, 2]]


def raising(error: Exception, times: int = 1) -> Link:
    """A SuperLink that answers some questions for replies with an error, once the first work is sent."""
    link, left = link_of(2), [error] * times
    pull = link.pull

    def pull_or_error(names: Any, most: float) -> Any:
        if link.works(11) and left:
            raise left.pop()
        return pull(names, most)

    link.pull = pull_or_error  # type: ignore[method-assign]
    return link


def test_an_error_of_the_superlinks_own_is_an_outage() -> None:
    """A database that is locked for a while is one: 500, Internal server error."""
    with pytest.warns(UserWarning, match="does not answer, trying again: here:1 answers 500"):
        assert who(raising(LinkLost("here:1 answers 500: Internal server error."), 3), 2, timeout=20.0) == [[0, 1]]


@pytest.mark.parametrize("code", sorted(RUN_GONE))
def test_a_run_that_the_superlink_does_not_know_is_told_from_what_somebody_else_refuses(code: int) -> None:
    with pytest.raises(FederationError, match=r"does not know this run any more \(gone\).* without --database"):
        who(raising(LinkRefuses("gone", 401, code)), 2, timeout=20.0)
    for refused in (LinkRefuses("here:1 answers 403: no", 403), LinkRefuses("[code: 3004] node", 403, 3004)):
        with pytest.raises(FederationError, match=r"^The SuperLink, or a proxy before it, refuses: .*(403: no|3004)"):
            who(raising(refused), 2, timeout=20.0)


def test_a_part_of_a_reply_that_is_not_given_for_a_while_does_not_lose_the_reply() -> None:
    def parts(error: Exception) -> ReplyUnderWay:
        def fetch() -> bool:
            raise error

        return ReplyUnderWay(SimpleNamespace(fetch=fetch), "", lambda name: None, Address("here:1"))  # type: ignore[arg-type]

    with pytest.raises(LinkLost, match="500"):
        parts(LinkLost("here:1 answers 500")).take()
    assert isinstance(parts(PartsGone("gone")).take(), PartsGone)
    assert isinstance(parts(LinkRefuses("no", 403)).take(), LinkRefuses)
