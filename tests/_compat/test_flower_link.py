"""A message whose parts come one after the other, or not at all: nobody waits, and each part is taken once."""

from __future__ import annotations

import math
import re
import threading
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

from lightning_fed._compat import flower_link
from lightning_fed._compat.flower_address import Address, LinkLost, LinkRefuses
from lightning_fed._compat.flower_link import STALLED, Arriving, Traffic, in_session, say_goodbye, talking

PARTS = [f"part-{i}" for i in range(20)]


class Store:
    """A SuperLink's parts: those that are here, and which were asked for."""

    def __init__(self) -> None:
        self.here: dict[str, bytes] = {}
        self.forgotten = False
        self.asked: list[str] = []

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        self.asked.append(name := request.object_id)
        content = self.here.get(name, b"")
        return PullObjectResponse(
            object_found=not self.forgotten, object_available=bool(content), object_content=content
        )

    def come(self, *names: str) -> None:
        self.here |= {name: name.encode() for name in names}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(flower_link, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def arriving_from(store: Any, traffic: Traffic, parts: list[str] = PARTS, most: float = math.inf) -> Arriving:
    tree = ObjectTree(object_id="message", children=[ObjectTree(object_id=name) for name in parts])
    return Arriving(store, Node(node_id=1), 1, tree, traffic, most)


def test_parts_are_taken_as_they_come_each_once(clock):
    store, traffic = Store(), Traffic()
    arriving = arriving_from(store, traffic)
    assert not arriving.fetch()
    store.come(*PARTS[:10])
    clock[0] += 2
    assert not arriving.fetch()
    assert sorted(arriving.parts) == sorted(PARTS[:10])
    store.come(*PARTS[10:], "message")
    store.asked.clear()
    clock[0] += 2
    assert arriving.fetch()
    assert sorted(store.asked) == sorted([*PARTS[10:], "message"])
    assert arriving.parts == store.here
    assert traffic.received == sum(map(len, store.here.values()))


def test_what_is_not_here_is_asked_for_a_few_times_a_second_however_many_parts_it_has(clock):
    store = Store()
    arriving = arriving_from(store, Traffic(), [f"{i}" for i in range(100_000)])
    for _ in range(100):
        assert not arriving.fetch()
        clock[0] += 0.1
    assert len(store.asked) < 150


def test_a_message_that_comes_slowly_comes_and_one_that_has_stopped_is_given_up(clock):
    store = Store()
    arriving = arriving_from(store, Traffic())
    for part in PARTS:  # an hour and more in all
        clock[0] += STALLED - 1
        store.come(part)
        assert not arriving.fetch()
    clock[0] += STALLED + 1
    with pytest.raises(ObjectPullError, match=f"nothing of the message has come for {STALLED:g} s"):
        arriving.fetch()


def test_a_message_that_the_superlink_has_forgotten_is_given_up_at_once(clock):
    store = Store()
    store.forgotten = True
    with pytest.raises(ObjectPullError, match="could not be found"):
        arriving_from(store, Traffic()).fetch()


def test_a_message_of_more_bytes_than_it_may_have_is_given_up_before_all_of_them_have_come(clock):
    store, traffic = Store(), Traffic()
    store.come(*PARTS, "message")
    arriving = arriving_from(store, traffic, most=20)
    with pytest.raises(ValueError, match=r"\d+ bytes and more; at most 20 are taken"):
        arriving.fetch()
    assert len(arriving.parts) < len(PARTS)


def test_a_message_of_very_many_parts_leaves_others_their_turn(clock):
    store = Store()
    many = [f"{i}" for i in range(1000)]
    store.come(*many, "message")
    pull = store.PullObject

    def slow(request: Any) -> Any:
        clock[0] += 0.1
        return pull(request)

    arriving = arriving_from(SimpleNamespace(PullObject=slow), Traffic(), many)
    turns = 0
    while not arriving.fetch():
        turns += 1
        clock[0] += 1
    assert turns > 20


def test_nobody_waits_for_a_goodbye_that_is_not_heard():
    start = time.monotonic()
    hangs = threading.Event()
    say_goodbye(hangs.wait, 0.1)
    assert time.monotonic() - start < 3
    hangs.set()
    say_goodbye(lambda: 1 / 0, 3.0)
    said: list[int] = []
    say_goodbye(lambda: said.append(1), 3.0)
    assert said == [1]


def said_by(status: int, text: str) -> Exception:
    response = httpx.Response(status, text=text, request=httpx.Request("POST", "http://here:1/v1/fleet/push-messages"))
    with pytest.raises(ConnectionError) as raised, talking(Address("here:1", True)):
        response.raise_for_status()
    return raised.value


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 507])
def test_what_may_work_in_a_while_is_an_outage(status):
    error = said_by(status, "come back later")
    assert isinstance(error, LinkLost)
    assert str(error) == f"here:1 answers {status}: come back later"


def test_what_will_not_is_refused_with_status_and_text():
    error = said_by(413, "<html>" + "too large " * 99)
    assert isinstance(error, LinkRefuses)
    assert (error.status, error.code) == (413, None)
    assert re.fullmatch(r"here:1 answers 413: <html>(too large )+.{0,10}", str(error))
    own = said_by(403, '{"code": 2007, "detail": "Run status not allowed."}')
    assert isinstance(own, LinkRefuses)
    assert (own.status, own.code, str(own)) == (403, 2007, "[code: 2007] Run status not allowed.")


def answer(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://here:1/v1/fleet/push-object")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(status, request=request))


def test_a_part_is_sent_again_in_the_session_in_which_the_superlink_waits_for_it(clock, monkeypatch):
    """When the message is announced anew, it asks for no part that it waits for already."""
    errors, sent, over = [answer(429), httpx.ReadError("reset"), answer(500)], list[str](), threading.Event()
    monkeypatch.setattr(over, "wait", lambda seconds: False)

    def push() -> None:
        if errors:
            raise errors.pop()
        sent.append("part")

    in_session(push, over)
    assert sent == ["part"]
    errors += [answer(413)]
    with pytest.raises(httpx.HTTPStatusError):
        in_session(push, over)


def test_it_is_given_up_when_that_takes_too_long_or_the_sender_leaves(clock, monkeypatch):
    over, tries = threading.Event(), list[float]()

    def push() -> None:
        tries.append(clock[0])
        clock[0] += 1
        raise answer(503)

    monkeypatch.setattr(over, "wait", lambda seconds: False)
    with pytest.raises(httpx.HTTPStatusError):
        in_session(push, over)
    assert 5 < len(tries) < 20
    tries.clear()
    monkeypatch.setattr(over, "wait", lambda seconds: True)
    with pytest.raises(httpx.HTTPStatusError):
        in_session(push, over)
    assert len(tries) == 1
