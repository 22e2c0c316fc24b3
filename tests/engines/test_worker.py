"""What a worker does with what it is told, in this process: replies in order, and no exception that is not a reply."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.clientapp import ClientApp

from lightning_fed.engines import transport
from lightning_fed.engines.in_process import InProcess
from lightning_fed.engines.served import OneByOne, served
from lightning_fed.engines.worker import Done, Failed, Shared, Start, Task, serve, work
from lightning_fed.testing import counting_client, failing_client, toy_weights
from lightning_fed.wire import messages
from tests.engines.clients import KeywordOnly, client_that, train_messages


def task(client: int, arrays: ArrayRecord | int | None = None, **options: Any) -> Task:
    """To train a client on the toy weights, or on those that were sent ahead under a number."""
    (message,) = InProcess().run(lambda grid: train_messages(grid, [client + 1]), ClientApp(), lambda: 9)
    content: dict[str, Any] = dict(message.content.items())
    if arrays is not None:
        content[messages.ARRAYS] = arrays
    context = Context(1, client + 1, {messages.CLIENT: client, "num-partitions": 9}, RecordDict(), {})
    return Task(message.metadata, content, options.pop("call", 0), context, **options)


def replies_to(app: ClientApp, tasks: Sequence[Task], known: Any = None, pack: Any = lambda done: done) -> Any:
    return InProcess().run(lambda grid: serve(served(app), tasks, known or {}, pack), app, lambda: 9)


def scalar(done: Done) -> float:
    return float(messages.unpack(done.reply.content[messages.ARRAYS])["scalar"])


# ------------------------------------------------------------------------------------------------------- one call


def test_a_client_s_reply_comes_with_what_it_keeps() -> None:
    (done,) = replies_to(counting_client(), [task(2)])
    assert scalar(done) == 2.5 + 3
    assert done.state["calls"] == {"n": 1}
    assert done.exception is None


def test_arrays_that_were_sent_ahead_are_the_messages_and_stay_as_they_are() -> None:
    known = {(4, 7): messages.pack({"scalar": torch.tensor(10.0)})}
    for _ in range(2):
        (done,) = replies_to(counting_client(), [task(0, arrays=7, call=4)], known)
        assert scalar(done) == 11.0
    assert float(messages.unpack(known[4, 7])["scalar"]) == 10.0


def test_an_exception_is_a_reply_and_goes_along_in_bytes() -> None:
    (done,) = replies_to(failing_client(lambda client: True), [task(1)])
    assert done.reply.has_error()
    assert "client 1 fails" in done.reply.error.reason
    assert "exception" not in vars(done.reply.error)
    exception = pickle.loads(done.exception)
    assert (type(exception), str(exception)) == (ValueError, "client 1 fails")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_also_what_would_end_the_worker_is_a_reply(error: type[BaseException]) -> None:
    def ends(client: int) -> None:
        raise error

    (done,) = replies_to(client_that(ends), [task(0)])
    assert error.__name__ in done.reply.error.reason


def test_what_the_server_changed_is_applied_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(OneByOne, "change", lambda self, changes: told.append(changes))
    replies_to(client_that(told.append), [task(3, changes=[b"one", b"two"])])
    assert told == [b"one", b"two", 3]


def test_of_several_replies_only_the_one_that_cannot_be_packed_is_an_error() -> None:
    def pack(done: list[Done]) -> list[Done]:
        if any(not one.reply.has_error() and scalar(one) == 2.5 + 2 for one in done):
            raise TypeError("cannot be pickled")
        return done

    done = replies_to(counting_client(), [task(0), task(1), task(2)], pack=pack)
    assert [one.reply.has_error() for one in done] == [False, True, False]
    assert [scalar(done[0]), scalar(done[2])] == [3.5, 5.5]
    assert "TypeError: cannot be pickled" in done[1].reply.error.reason
    assert done[1].state is None
    assert [one.state["calls"] for one in (done[0], done[2])] == [{"n": 1}, {"n": 1}]


# ------------------------------------------------------------------------------------------------------- a connection


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The engine's and the worker's end; what a worker's main function changes in its process is put back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers, visible = {n: signal.getsignal(n) for n in numbers}, os.environ.get("CUDA_VISIBLE_DEVICES")
    signal.signal(signal.SIGTERM, lambda *args: None)
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    yield ours, theirs
    ours.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible


def said_to(ends: tuple[socket.socket, socket.socket], told: Sequence[Any], *args: Any) -> list[Any]:
    """What a worker that is told all this, and then that the engine has gone, says."""
    ours, theirs = ends
    for one in told:
        transport.transmit(ours, one if isinstance(one, transport.Packed) else transport.dump(one, by_value=True))
    ours.shutdown(socket.SHUT_WR)
    work(theirs, *(args or (None, None, ())))
    found = []
    while True:
        try:
            found.append(transport.receive(ours))
        except EOFError:
            return found


def test_a_worker_is_ready_serves_and_ends_with_the_engine(ends: Any) -> None:
    start = Start(served(counting_client()), run_id=5, threads=1)
    ready, *replies = said_to(ends, [start, [task(0)], [task(4)]])
    assert ready is None
    assert [[scalar(done) for done in reply] for reply in replies] == [[3.5], [7.5]]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_arrays_of_an_earlier_call_are_forgotten_with_the_first_of_the_next(ends: Any) -> None:
    def shared(call: int, key: int, value: float) -> Shared:
        return Shared(call, key, messages.pack({"scalar": torch.tensor(value)}))

    told = [shared(1, 0, 10.0), shared(1, 1, 20.0), [task(0, arrays=0, call=1)], [task(0, arrays=1, call=1)]]
    _, *replies = said_to(ends, [Start(served(counting_client()), 5, 1), *told])
    assert [scalar(done) for (done,) in replies] == [11.0, 21.0]


def test_arrays_of_an_earlier_call_are_gone(ends: Any) -> None:
    arrays = messages.pack(toy_weights())
    told = [Shared(1, 0, arrays), Shared(2, 0, arrays), [task(0, arrays=0, call=1)]]
    with pytest.raises(KeyError):
        said_to(ends, [Start(served(counting_client()), 5, 1), *told])


def test_a_start_that_cannot_be_read_is_told(ends: Any) -> None:
    (failed,) = said_to(ends, [transport.Packed(b"no pickle", [])])
    assert isinstance(failed, Failed)
    assert "UnpicklingError" in failed.traceback
    assert not failed.by_fork


def test_a_fork_in_which_autograd_does_not_work_is_told(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any, **options: Any) -> None:
        raise RuntimeError("Unable to handle autograd's threading in combination with fork")

    monkeypatch.setattr(torch.Tensor, "backward", refuses)
    (failed,) = said_to(ends, [], None, Start(served(counting_client()), 5, 1), ())
    assert failed.by_fork
    assert "Unable to handle autograd's threading" in failed.traceback


def test_a_fork_inherits_its_start_and_closes_what_is_not_its_own(ends: Any) -> None:
    one, other = socket.socketpair()
    (ready,) = said_to(ends, [], None, Start(served(counting_client()), 5, 1), (one,))
    assert ready is None
    assert one.fileno() == -1
    other.close()


@pytest.mark.parametrize(("visible", "sees"), [(None, "1"), ("4,7", "7")])
def test_a_worker_sees_one_of_the_devices_that_the_engine_sees(
    ends: Any, monkeypatch: pytest.MonkeyPatch, visible: str | None, sees: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    said_to(ends, [], 1, None, ())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == sees


def test_an_exception_that_cannot_be_read_back_is_bytes_of_its_own() -> None:
    def raises(client: int) -> None:
        raise KeywordOnly(code=7)

    (done,) = replies_to(client_that(raises), [task(0)])
    assert "code 7" in done.reply.error.reason
    with pytest.raises(TypeError):
        pickle.loads(done.exception)
    transport.to_bytes(done)


def test_an_exception_that_cannot_be_bytes_is_told_in_words() -> None:
    def raises(client: int) -> None:
        raise ValueError("locked", threading.Lock())

    (done,) = replies_to(client_that(raises), [task(0)])
    assert "ValueError: ('locked'" in done.reply.error.reason
    assert done.exception is None
