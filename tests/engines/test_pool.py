"""How workers start, are told of changes, are replaced and end, with toys in place of processes."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest

from lightning_fed.engines import pool as pool_module
from lightning_fed.engines import transport
from lightning_fed.engines.pool import Pool, Worker, start_method
from lightning_fed.engines.served import served
from lightning_fed.engines.worker import Failed, Start
from lightning_fed.errors import ConfigurationError
from lightning_fed.testing import counting_client


def test_what_partition_imports_is_imported_once_for_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    import flwr_datasets.partitioner  # noqa: F401

    told: list[list[str]] = []
    monkeypatch.setattr(ForkServerContext, "set_forkserver_preload", lambda self, names: told.append(names))
    pool_module._forkserver()
    monkeypatch.delitem(sys.modules, "flwr_datasets.partitioner")
    pool_module._forkserver()
    worker = "lightning_fed.engines.worker"
    assert told == [[worker, "flwr_datasets.partitioner"], [worker]]


class Process:
    """A process that ends with this exit code; ``None`` for one that does not, however it is asked."""

    def __init__(self, exitcode: int | None, after: str = "") -> None:
        self.exitcode, self._after = (None, exitcode) if after else (exitcode, exitcode)
        self._when = after
        self.asked: list[str] = []

    def _end(self, how: str) -> None:
        self.asked.append(how)
        if how == self._when:
            self.exitcode = self._after

    def terminate(self) -> None:
        self._end("terminate")

    def kill(self) -> None:
        self._end("kill")

    def join(self, timeout: float) -> None:
        self.asked.append("join")

    def close(self) -> None:
        self.asked.append("close")


class Toys(Pool):
    """A pool whose processes are toys; ``theirs`` are their ends of the connections."""

    def __init__(self, method: Any = None, devices: Any = (), exitcodes: Any = ()) -> None:
        super().__init__(Start(served(counting_client()), 1, 1), list(devices), method, [])
        self.theirs: list[socket.socket] = []
        self.launched: list[int | None] = []
        self._exitcodes = iter(exitcodes)

    def launch(self, device: int | None) -> tuple[socket.socket, Any, int]:
        ours, theirs = socket.socketpair()
        self.theirs.append(theirs)
        self.launched.append(device)
        return ours, Process(next(self._exitcodes, 0)), len(self.changes)

    def says(self, what: Any) -> Any:
        """What the last worker makes of what its process says."""
        transport.transmit(self.theirs[-1], transport.dump(what))
        return self.workers[-1].receive()


@pytest.fixture
def toys() -> Iterator[Any]:
    made: list[Toys] = []

    def make(*args: Any, workers: int = 1, **options: Any) -> Toys:
        made.append(Toys(*args, **options))
        made[-1].grow(workers)
        return made[-1]

    yield make
    for one in made:
        one.close()
        for end in one.theirs:
            end.close()


def test_a_pool_grows_to_a_number_and_gives_devices_in_turn(toys: Any) -> None:
    pool = toys(devices=[0, 2], workers=2)
    pool.grow(5)
    pool.grow(3)
    assert pool.launched == [0, 2, 0, 2, 0]
    assert toys(workers=2).launched == [None, None]
    workers = pool.workers
    pool.close()
    assert (pool.workers, pool.closed) == ([], True)
    assert [worker.end() for worker in workers] == ["has ended"] * 5


def test_a_worker_is_told_of_each_change_once_and_a_new_one_of_none_before_it(toys: Any) -> None:
    pool = toys()
    pool.changes += [b"one", b"two"]
    (worker,) = pool.workers
    assert list(worker.changes()) == [b"one", b"two"]
    pool.changes.append(b"three")
    assert list(worker.changes()) == [b"three"]
    assert list(worker.changes()) == []
    pool.grow(2)
    assert list(pool.workers[1].changes()) == []
    pool.changes.append(b"four")
    worker.replace()
    assert list(worker.changes()) == []


# ------------------------------------------------------------------------------------------------- what a process says


def test_a_process_that_is_ready_says_nothing_else(toys: Any) -> None:
    pool = toys()
    assert not pool.workers[0].ready
    assert pool.says(None) is None
    assert pool.workers[0].ready
    assert pool.says(["done"]) == ["done"]


def test_a_process_that_is_gone_is_the_end_of_what_it_says(toys: Any) -> None:
    pool = toys()
    pool.theirs[0].close()
    with pytest.raises(EOFError):
        pool.workers[0].receive()


def test_a_fork_that_cannot_work_gives_way_and_all_later_ones_are_no_forks(toys: Any) -> None:
    pool = toys(workers=1)
    assert pool.says(Failed("autograd", by_fork=True)) is None
    assert (len(pool.launched), pool._found) == (2, "forkserver")
    assert pool.says(None) is None
    assert pool.workers[0].ready


@pytest.mark.parametrize(("method", "by_fork"), [("fork", True), (None, False), ("forkserver", False)])
def test_a_process_that_cannot_start_is_an_error_with_its_words(toys: Any, method: Any, by_fork: bool) -> None:
    with pytest.raises(ConfigurationError, match=r"^A worker process cannot start:\nno such thing"):
        toys(method).says(Failed("no such thing", by_fork=by_fork))


# --------------------------------------------------------------------------------------------------------- replacing


def test_the_third_process_in_a_row_that_dies_before_it_is_ready_is_an_error(toys: Any) -> None:
    pool = toys(exitcodes=[-9, 3, 1])
    (worker,) = pool.workers
    assert worker.replace() == "was ended by SIGKILL"
    assert worker.replace() == "ended with exit code 3"
    with pytest.raises(
        ConfigurationError, match=r"^3 worker .* in a row could not start: the last one ended with exit code 1\.$"
    ):
        worker.replace()
    assert len(pool.launched) == 3


def test_only_those_that_die_before_they_are_ready_count(toys: Any) -> None:
    pool = toys()
    (worker,) = pool.workers
    for _ in range(2):
        worker.replace()
    for _ in range(2):
        pool.says(None)
        for _ in range(3):  # one that was ready, and two that were not
            worker.replace()
    with pytest.raises(ConfigurationError, match="3 worker processes in a row"):
        worker.replace()


def test_those_that_die_later_or_while_others_work_are_replaced_for_ever(toys: Any) -> None:
    pool = toys()
    for _ in range(5):
        pool.says(None)
        pool.workers[0].replace()
        assert not pool.workers[0].ready
    pool.grow(2)
    pool.says(None)
    for _ in range(5):
        pool.workers[0].replace()
    assert len(pool.launched) == 1 + 5 + 1 + 5


@pytest.mark.parametrize(
    ("process", "says", "asked"),
    [
        (Process(0), "ended with exit code 0", ["join", "close"]),
        (Process(-15, after="terminate"), "was ended by SIGTERM", ["join", "terminate", "join", "close"]),
        (Process(-9, after="kill"), "was ended by SIGKILL", ["join", "terminate", "join", "kill", "join", "close"]),
        (Process(None), "does not end", ["join", "terminate", "join", "kill", "join"]),
    ],
)
def test_a_process_is_asked_to_end_more_and_more_firmly(toys: Any, process: Any, says: str, asked: list[str]) -> None:
    worker: Worker = toys().workers[0]
    worker._process = process
    assert worker.end() == says
    assert process.asked == asked
    assert worker.connection.fileno() == -1
    assert worker.end() == "has ended"


# ---------------------------------------------------------------------------------------------------------- starting


@pytest.mark.parametrize(
    ("threads", "alive", "cuda", "platform", "method"),
    [
        (1, 1, False, "linux", "fork"),
        (2, 1, False, "linux", "forkserver"),
        (1, 2, False, "linux", "forkserver"),
        (1, 1, True, "linux", "forkserver"),
        (1, 1, False, "darwin", "forkserver"),
    ],
)
def test_workers_are_forked_only_where_that_is_safe(
    monkeypatch: pytest.MonkeyPatch, threads: int, alive: int, cuda: bool, platform: str, method: str
) -> None:
    monkeypatch.setattr("threading.active_count", lambda: alive)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: cuda)
    monkeypatch.setattr(sys, "platform", platform)
    assert start_method(None, threads) == method
    assert start_method("fork", threads) == "fork"
    assert start_method("forkserver", threads) == "forkserver"


def test_the_user_s_script_is_out_of_sight_while_a_worker_starts() -> None:
    main = sys.modules["__main__"]
    with pool_module._main_left_out():
        seen = sys.modules["__main__"]
    assert seen is not main
    assert not hasattr(seen, "__file__")
    assert sys.modules["__main__"] is main
