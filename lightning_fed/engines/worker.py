"""What runs in a worker process: the client app, for one client after the other."""

from __future__ import annotations

import os
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from flwr.app import ArrayRecord, Context, Message, Metadata, RecordDict

from lightning_fed._compat.flower import server_identity
from lightning_fed.engines import transport
from lightning_fed.engines.in_process import deliver
from lightning_fed.engines.served import answer
from lightning_fed.wire import messages
from lightning_fed.wire.served_app import ServedApp

T = TypeVar("T")


@dataclass
class Start:
    """The first thing that a worker is told.

    Attributes:
        app: What it runs.
        run_id: Flower's number of the run.
        threads: How many threads torch may use.
    """

    app: ServedApp
    run_id: int
    threads: int


@dataclass
class Shared:
    """Arrays that many messages have in common, sent ahead of them; those of an earlier call may be forgotten."""

    call: int
    key: int
    arrays: ArrayRecord


@dataclass
class Task:
    """One client's work; a worker is told of one or more at a time.

    Attributes:
        metadata: That of the message.
        content: Its records by name; for shared ones the key under which they were sent ahead.
        call: To which call the shared ones belong.
        context: The client's.
        changes: What the server has changed, since this worker was told last, of what workers have copies of.
    """

    metadata: Metadata
    content: dict[str, Any]
    call: int
    context: Context
    changes: Sequence[bytes] = ()


@dataclass
class Done:
    """What came of it.

    Attributes:
        reply: The client's.
        state: What the client keeps; ``None`` for what it had.
        exception: What it raised, pickled, where that can be done.
    """

    reply: Message
    state: Any
    exception: bytes | None = None


@dataclass
class Failed:
    """The worker cannot start; ``by_fork`` says that it could if it were no fork."""

    traceback: str
    by_fork: bool = False


def work(connection: socket.socket, device: int | None, start: Start | None, foreign: Sequence[socket.socket]) -> None:
    """Serve tasks until the other side goes away: the worker's main function.

    Args:
        connection: To the engine.
        device: The only CUDA device that this process shall see, of those that the engine's sees; ``None`` for all.
        start: What a forked process inherits; ``None`` where the engine sends it.
        foreign: What else it inherits: the engine's ends of all connections, which here would keep them open for ever.
    """
    # Ctrl-C reaches all processes of a terminal; the engine's decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in foreign:
        other.close()
    if device is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
    try:
        if (start := _inherited(connection, start) if start else _told(connection)) is not None:
            _serve(connection, start)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the engine has gone, or wants no more
    finally:
        connection.close()


def _inherited(connection: socket.socket, start: Start) -> Start | None:
    torch.set_num_threads(1)
    try:
        # Autograd refuses to work in a fork of a process in which it has started threads, and nothing else tells.
        torch.zeros(1, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError:
        transport.transmit(connection, transport.dump(Failed(traceback.format_exc(), by_fork=True)))
        return None
    return start


def _told(connection: socket.socket) -> Start | None:
    try:
        return transport.receive(connection)
    except EOFError:
        raise
    except Exception:
        transport.transmit(connection, transport.dump(Failed(traceback.format_exc())))
        return None


def _serve(connection: socket.socket, start: Start) -> None:
    torch.set_num_threads(start.threads)
    transport.transmit(connection, transport.dump(None))
    known: dict[tuple[int, int], ArrayRecord] = {}
    with server_identity(start.run_id):
        while True:
            told = transport.receive(connection)
            if isinstance(told, Shared):
                known = {key: record for key, record in known.items() if key[0] == told.call}
                known[told.call, told.key] = told.arrays
            else:
                transport.transmit(connection, serve(start.app, told, known, transport.dump))


def serve(
    app: ServedApp,
    tasks: Sequence[Task],
    known: dict[tuple[int, int], ArrayRecord],
    pack: Callable[[list[Done]], T],
) -> T:
    """Do clients' work, and pack it; an exception is a reply, also that of packing it.

    Args:
        app: The client app.
        tasks: What to do.
        known: The arrays that were sent ahead.
        pack: Makes of the results what can be sent.
    """
    received = []
    for task in tasks:
        for changes in task.changes:
            app.change(changes)
        records = {name: known[task.call, r] if isinstance(r, int) else r for name, r in task.content.items()}
        received.append((deliver(task.metadata, RecordDict(records)), task.context))
    try:
        replies = answer(app, received)
    except BaseException as exception:  # Ctrl-C is not heard here: the client's code raised it, or would end the worker
        replies = [messages.error_reply(message, exception) for message, _ in received]
    done = [_sealed(reply, context) for reply, (_, context) in zip(replies, received, strict=True)]
    try:
        return pack(done)
    except Exception:
        return pack([_packable(one, message, pack) for one, (message, _) in zip(done, received, strict=True)])


def _sealed(reply: Message, context: Context) -> Done:
    """Make a reply's exception bytes: reading these may fail without the rest, and what it says is text anyway."""
    done = Done(reply, context.state)
    exception = reply.error.__dict__.pop("exception", None) if reply.has_error() else None
    with suppress(Exception):
        done.exception = None if exception is None else transport.to_bytes(exception)
    return done


def _packable(done: Done, message: Message, pack: Callable[[list[Done]], Any]) -> Done:
    """Return what can be sent of it: where that is not all, the error."""
    try:
        pack([done])
        return done
    except Exception as exception:
        return Done(done.reply if done.reply.has_error() else messages.error_reply(message, exception), None)
