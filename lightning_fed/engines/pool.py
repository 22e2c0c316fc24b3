"""Worker processes as the engine sees them: how they start, what is said to them, how they end."""

from __future__ import annotations

import multiprocessing
import signal
import socket
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Literal

import torch

from lightning_fed.engines import remote, transport
from lightning_fed.engines.worker import Done, Failed, Start, work
from lightning_fed.errors import ConfigurationError

StartMethod = Literal["fork", "forkserver"]

# Workers that die so often in a row without having been ready will not start, unless others do work.
_ATTEMPTS = 3
_FORKS_ARE_SENT_NOTHING = (
    "Processes are forks, to which nothing is sent, where no other thread runs here (a logger's or a progress bar's:"
    " logger=False), or with Processes(start_method='fork')."
)
# Seconds that what has begun to pass may stand still: a process that was stopped (SIGSTOP) neither takes nor gives.
STANDSTILL = 60.0


class Pool:
    """The workers of one run.

    Args:
        start: What they run.
        devices: CUDA devices by index, given to the workers in turn; empty for no choice.
        method: How they start, or ``None`` for what is safe when they do.
        changes: What the server has changed since the run began; it grows.
    """

    def __init__(self, start: Start, devices: list[int], method: StartMethod | None, changes: list[bytes]) -> None:
        self._start, self._devices, self._method, self.changes = start, devices, method, changes
        self._changes_packed = 0  # how many of them are in what is packed
        self._found: StartMethod | None = None
        self._packed: transport.Packed | None = None
        self.workers: list[Worker] = []
        self.closed = False

    def grow(self, count: int) -> None:
        """Start workers until there are ``count``."""
        while len(self.workers) < count:
            number = len(self.workers)
            self.workers.append(Worker(self, self._devices[number % len(self._devices)] if self._devices else None))

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.end()
        self.workers, self._packed, self.closed = [], None, True

    def stop_forking(self) -> bool:
        """Start workers without a fork from now on, unless the user asked for it."""
        if self._method == "fork":
            return False
        self._found = "forkserver"
        return True

    def launch(self, device: int | None) -> tuple[socket.socket, BaseProcess, int]:
        """Return a new process, the connection to it, and how many changes it begins with."""
        ours, theirs = socket.socketpair()
        try:
            if start_method(self._method or self._found, self._start.threads) == "fork":
                ends = [ours, *(worker.connection for worker in self.workers)]
                context = multiprocessing.get_context("fork")
                process: BaseProcess = context.Process(target=work, args=(theirs, device, self._start, ends))
                process.start()
                known = len(self.changes)
            else:
                if self._packed is None:
                    self._changes_packed = len(self.changes)
                known = self._changes_packed
                packed = self._packed = self._packed or remote.packed(
                    self._start, "processes", transport.dump, _FORKS_ARE_SENT_NOTHING
                )
                with _main_left_out():
                    process = _forkserver().Process(target=work, args=(theirs, device, None, ()))
                    process.start()
                with suppress(OSError):  # one that is dead already is found out when it is listened to
                    transport.transmit(ours, packed)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.settimeout(STANDSTILL)
        return ours, process, known


class Worker:
    """One worker process, and those that replace it."""

    def __init__(self, pool: Pool, device: int | None) -> None:
        self._pool, self._device = pool, device
        self._failures = 0
        self.ready = False
        self._process: BaseProcess | None
        self.connection, self._process, self._known = pool.launch(device)

    def send(self, packed: transport.Packed) -> None:
        """Tell the process something."""
        transport.transmit(self.connection, packed)

    def changes(self) -> Sequence[bytes]:
        """Return what has changed since the process started, or since this was asked last."""
        new = self._pool.changes[self._known :]
        self._known = len(self._pool.changes)
        return new

    def receive(self) -> list[Done] | None:
        """Return what the process says; ``None`` when it is ready, or gave way to one that will be.

        Raises:
            EOFError: If it died.
            ConfigurationError: If it cannot start.
        """
        said = transport.receive(self.connection)
        if isinstance(said, Failed) and said.by_fork and self._pool.stop_forking():
            self.end()
            self.connection, self._process, self._known = self._pool.launch(self._device)
            return None
        if isinstance(said, Failed):
            raise ConfigurationError(f"A worker process cannot start:\n{said.traceback}")
        if said is None:
            self.ready, self._failures = True, 0
        return said

    def replace(self) -> str:
        """End the process, say how it ended, and start another.

        Raises:
            ConfigurationError: If process after process dies before it is ready.
        """
        how = self.end()
        self._failures += not self.ready
        self.ready = False
        if self._failures >= _ATTEMPTS and not any(worker.ready for worker in self._pool.workers):
            raise ConfigurationError(f"{_ATTEMPTS} worker processes in a row could not start: the last one {how}.")
        self.connection, self._process, self._known = self._pool.launch(self._device)
        return how

    def end(self) -> str:
        """End the process, if it has not ended, and say how it did."""
        self.connection.close()
        process, self._process = self._process, None
        if process is None:
            return "has ended"
        process.join(0.2 if self.ready else 0)
        for kill, patience in ((process.terminate, 2), (process.kill, 60)):  # on a busy machine even that takes a while
            if process.exitcode is None:
                kill()
                process.join(patience)
        code = process.exitcode
        if code is None:
            return "does not end"
        process.close()
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


def start_method(wanted: StartMethod | None, threads: int) -> StartMethod:
    """Return how workers start: as wanted, else by a fork where that is safe.

    A fork starts at once and has all that this process has. It must not inherit locks that another thread holds, a
    CUDA context, or a thread pool that it would use.
    """
    alone = threading.active_count() == 1 and threads == 1 and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return wanted or ("fork" if alone and sys.platform == "linux" else "forkserver")


def prepare() -> None:
    """Let the imports of the workers' common parent go on while this process opens the data."""
    _forkserver()
    with _main_left_out():
        from multiprocessing import forkserver

        forkserver.ensure_running()


def _forkserver() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # What Partition brings along takes each worker most of a second to import.
    partitioners = {"flwr_datasets.partitioner"} & sys.modules.keys()
    context.set_forkserver_preload(["lightning_fed.engines.worker", *partitioners])
    return context


@contextmanager
def _main_left_out() -> Iterator[None]:
    """Keep workers from running the user's script once more: what they need of it is sent by value."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
