"""What Flower keeps private and a local grid needs: runs, who sends a message, a message's number."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["Run", "make_message"]

R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord, RecordDict)


def new_run() -> Run:
    """Return a run with a number of its own."""
    return Run.create_empty(run_id=uuid.uuid4().int >> 65)


@contextmanager
def server_identity(run_id: int) -> Iterator[None]:
    """Let ``Message(...)`` be sent by the server of a run, in the block; it reads that from these variables."""
    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SUPERLINK_NODE_ID
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


def number(message: Message) -> None:
    """Give a message a number of its own, as Flower does where it sends one."""
    message.metadata.__dict__["_message_id"] = uuid.uuid4().hex


def filled(record: R, content: Mapping[str, Any]) -> R:
    """Fill a new record with a content of the right kind, without Flower's check of each part, which takes its time."""
    record.__dict__["_data"].update(content)
    return record
