"""The process engine: persistent worker processes on one machine, each serving one client after the other.

::

    engine                                          worker
    Start(app)                              ->      has module, data and options, once a run
    Shared(arrays)                          ->      the round's weights, in memory that all workers map
    Task(message, context)                  ->      the client app, as in process
                                            <-      Done(reply, what the client keeps)

Clients are handed out in their order, each to the next free worker, and replies come out in that order, whichever
worker made them: sums are those of one process, bit for bit.
"""

from __future__ import annotations

import os
import selectors
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from flwr.app import ArrayRecord, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from lightning_fed._compat.flower import server_identity
from lightning_fed.engines import transport
from lightning_fed.engines.base import Engine
from lightning_fed.engines.pool import Pool, StartMethod, Worker, prepare, start_method
from lightning_fed.engines.remote import AHEAD, RemoteGrid, TimeLimit
from lightning_fed.engines.worker import Shared, Start
from lightning_fed.errors import ClientError, ConfigurationError
from lightning_fed.tracebacks import words
from lightning_fed.wire import messages

T = TypeVar("T")


class Processes(Engine):
    """Runs clients in worker processes of this machine, which start once a run.

    A client's state stays with the client, whichever worker serves it. A worker that dies takes one client's work with
    it, which counts as failed, and is replaced. What a client's code changes outside the module (a global, a list in a
    client callback) stays in its worker.

    Args:
        num_workers: How many processes; by default one for each core that this process may use.
        threads: How many threads torch may use in each.
        devices: CUDA devices by index, handed out to the workers in turn; ``None`` for no choice.
        start_method: ``"fork"`` starts workers at once with all that this process has, which is safe as long as it has
            no other Python thread and no CUDA context, and the workers use one thread each. ``"forkserver"`` starts
            them from a process that has only made the imports, which takes as long as ``import lightning``, and sends
            them module and data by pickle. By default the former where it is safe.

    Raises:
        ConfigurationError: If a number is smaller than 1.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, engine=Processes(num_workers=2))
    """

    name = "processes"

    def __init__(
        self,
        num_workers: int | None = None,
        threads: int = 1,
        devices: list[int] | None = None,
        start_method: StartMethod | None = None,
    ) -> None:
        for name, value in {"num_workers": num_workers, "threads": threads}.items():
            if value is not None and value < 1:
                raise ConfigurationError(f"Processes({name}={value}) must be at least 1.")
        self.num_workers, self.threads = num_workers or _cores(), threads
        self.devices, self.start_method = devices or [], start_method

    @property
    def processes(self) -> int:
        """See ``Engine``."""
        return self.num_workers

    @property
    def shows_one_device(self) -> bool:
        """See ``Engine``."""
        return bool(self.devices)

    def run(self, main: Callable[[Grid], T], client_app: ClientApp, num_clients: Callable[[], int]) -> T:
        """See ``Engine``."""
        if start_method(self.start_method, self.threads) == "forkserver":
            prepare()
        grid = ProcessGrid(client_app, num_clients, self)
        try:
            with server_identity(grid.run.run_id):
                return main(grid)
        finally:
            grid.pool.close()


class ProcessGrid(RemoteGrid):
    """A Grid over the workers of a pool."""

    def __init__(self, client_app: ClientApp, num_clients: Callable[[], int], engine: Processes) -> None:
        super().__init__(client_app, num_clients)
        self._num_workers = engine.num_workers
        start = Start(self.app, self.run.run_id, engine.threads)
        self.pool = Pool(start, engine.devices, engine.start_method, self.changes)

    def _exchange(self, sent: list[Message], call: int, timeout: float | None) -> Iterator[Message]:
        # As late as this: by now Lightning has set module and data up.
        self.pool.grow(min(self._num_workers, len(sent)))
        return Delivery(self, sent, call, timeout).replies()


class Delivery:
    """One ``send_and_receive``: hands messages out, and gives their replies in order.

    Args:
        grid: Whose workers serve.
        sent: The messages.
        call: The number of this exchange in the run.
        timeout: Seconds to wait for all replies; in the second half of it nobody waits for one that is slow.
    """

    def __init__(self, grid: ProcessGrid, sent: list[Message], call: int, timeout: float | None) -> None:
        self.grid, self.sent, self.call = grid, sent, call
        self.deadline = TimeLimit(timeout)
        together = (
            min(grid.app.max_messages(sent[0].metadata.message_type), -(-len(sent) // len(grid.pool.workers)))
            if sent
            else 1
        )
        self.waiting = deque(range(first, min(first + together, len(sent))) for first in range(0, len(sent), together))
        self.ahead = max(AHEAD, together) * len(grid.pool.workers)
        self.at: dict[Worker, range] = {}  # what each busy worker does
        self.there: dict[int, Message] = {}
        self.shared: dict[int, tuple[int, transport.Packed]] = {}
        self.has: dict[Worker, set[int]] = {worker: set() for worker in grid.pool.workers}

    def replies(self) -> Iterator[Message]:
        """Return the replies in the order of the messages; those that do not come in time are left out."""
        try:
            for index in range(len(self.sent)):
                self._hand_out(index)
                while index not in self.there and not self.deadline.is_up:
                    self._collect(self.deadline.seconds)
                    self._hand_out(index)
                self._collect(0)
                self._hand_out(index)
                if index in self.there:
                    yield self.there.pop(index)
        finally:
            self.shared.clear()
            # Nobody waits for these any more. An exchange that an exception left is over only after the run.
            for worker in [] if self.grid.pool.closed else list(self.at):
                worker.replace()

    def _hand_out(self, first: int) -> None:
        for worker in self.has:
            if worker in self.at or not worker.ready:
                continue
            if not self.waiting or self.deadline.is_up:
                return
            if self.waiting[0].start > first + self.ahead and not self.deadline.presses:
                return
            indices = self.waiting.popleft()
            try:
                self._give(worker, [self.sent[index] for index in indices])
                self.at[worker] = indices
            except OSError:  # it died since its last sign of life
                self.waiting.appendleft(indices)
                worker.replace()
                self.has[worker] = set()

    def _give(self, worker: Worker, messages: Sequence[Message]) -> None:
        news = [worker.changes(), *[()] * (len(messages) - 1)]  # with the first is soon enough
        tasks = [
            self.grid.task(message, self._content(worker, message), self.call, new)
            for message, new in zip(messages, news, strict=True)
        ]
        worker.send(transport.dump(tasks))

    def _content(self, worker: Worker, message: Message) -> dict[str, Any]:
        """Return the records of a message; those that others have, too, are sent ahead."""
        content: dict[str, Any] = {}
        for name, record in message.content.items():
            if not isinstance(record, ArrayRecord):
                content[name] = record
                continue
            key = id(record)  # the messages keep it alive
            if key not in self.shared:
                number = len(self.shared)
                self.shared[key] = number, transport.dump(Shared(self.call, number, record))
            number, packed = self.shared[key]
            if number not in self.has[worker]:
                worker.send(packed)
                self.has[worker].add(number)
            content[name] = number
        return content

    def _collect(self, seconds: float | None) -> None:
        """Take in what workers say, and wait so long until one does."""
        with selectors.DefaultSelector() as selector:
            for worker in self.has:
                selector.register(worker.connection, selectors.EVENT_READ, worker)
            heard = selector.select(seconds)
        for key, _ in heard:
            self._hear(key.data)

    def _hear(self, worker: Worker) -> None:
        try:
            said = worker.receive()
        except (EOFError, ConnectionResetError, TimeoutError):
            how = worker.replace()
            self.has[worker] = set()
            self._fail(worker, f"was lost: its worker process {how}. The process has been replaced.")
            return
        except ConfigurationError:
            raise
        except Exception as error:  # all of it has been read from the connection, which can go on
            self._fail(worker, f"sent what cannot be read: {words(error)}")
            return
        if said is not None:
            for index, done in zip(self.at.pop(worker), said, strict=True):
                self.there[index] = self.grid.take_back(self.sent[index], done)

    def _fail(self, worker: Worker, how: str) -> None:
        for index in self.at.pop(worker, ()):
            self.there[index] = messages.error_reply(self.sent[index], ClientError(how))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
