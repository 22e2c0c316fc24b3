"""What several test files share."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed._compat.flower import server_identity
from lightning_fed.engines import Engine, InProcess
from lightning_fed.engines.in_process import InProcessGrid
from lightning_fed.wire.packing import unpack_content

T = TypeVar("T")

# Arguments of a Trainer that writes nothing, shows nothing and runs on the CPU.
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "accelerator": "cpu",
}


def real_data(name: str) -> Path:
    """A folder of real data; where it is missing the test is skipped, and fails in CI."""
    folder = Path(os.environ.get("LIGHTNING_FED_DATA", Path(__file__).parents[2] / "shared" / "data")) / name
    if not folder.is_dir():
        import pytest  # workers import this module, and do without

        missing = f"There is no {folder}: set LIGHTNING_FED_DATA."
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    return folder


def sweep(cases: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Cases for ``parametrize``: those in ``always`` run in every suite, all others once a landing."""
    import pytest

    def at_landing(case: Any) -> Any:
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.landing)

    cases = list(cases)
    assert all(case in cases for case in always), f"{always} are not all among {cases}."
    return [case if case in always else at_landing(case) for case in cases]


def in_flower(main: Callable[[], T]) -> T:
    """Runs ``main`` where Flower's ``Message(...)`` knows who sends."""
    return InProcess().run(lambda grid: main(), ClientApp(), lambda: 1)


def class_sorted(sizes: Sequence[int] = (7, 53, 196), classes: int = 3, seed: int = 0) -> list[TensorDataset]:
    """Unequal clients' data (x: (n, 8), y: (n,)) of which each has mostly one class: far from IID."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (sum(sizes),), generator=generator).sort().values
    x = torch.randn(sum(sizes), 8, generator=generator) + 0.5 * y[:, None]
    return [TensorDataset(a, b) for a, b in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)]


def pooled(parts: Sequence[TensorDataset]) -> TensorDataset:
    """All clients' data as one dataset, in client order."""
    return TensorDataset(*(torch.cat(columns) for columns in zip(*(part.tensors for part in parts), strict=True)))


def loaders(parts: Sequence[TensorDataset], batch_size: int = 32) -> list[DataLoader]:
    return [DataLoader(part, batch_size=batch_size) for part in parts]


def over_the_wire(content: RecordDict) -> RecordDict:
    """What comes out on the other side of a connection: every array is its bytes."""
    received = RecordDict()
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            record = ArrayRecord({name: Array(a.dtype, a.shape, a.stype, a.data) for name, a in record.items()})
        received[key] = type(record)(dict(record))
    return received


class LastFirst(Engine):
    """Trains the clients of a cohort in this process, the last first, and gives their replies in order."""

    name = "last_first"

    def run(self, main: Callable[[Grid], T], client_app: ClientApp, num_clients: Callable[[], int]) -> T:
        grid = _LastFirstGrid(client_app, num_clients)
        with server_identity(grid.run.run_id):
            return main(grid)


class _LastFirstGrid(InProcessGrid):
    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        answer = super().send_and_receive
        replies = [reply for one in reversed(list(messages)) for reply in answer([one])]
        yield from reversed(replies)


class SuperLinkLike(Grid):
    """A grid that is not ours: random addresses, no roster, and replies as a list in an order of their own.

    Args:
        client_app: What every node runs.
        nodes: Address -> node config.
        order: Reorders (or drops) the replies.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: dict[int, dict[str, Any]],
        order: Callable[[list[Message]], list[Message]] = lambda replies: replies[::-1],
    ) -> None:
        self.app, self.order = client_app, order
        self.contexts = {node: Context(1, node, config, RecordDict(), {}) for node, config in nodes.items()}
        self.sent: list[Message] = []
        self.timeouts: list[float | None] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        messages = list(messages)
        self.sent += messages
        self.timeouts.append(timeout)
        return self.order([self._call(message) for message in messages])

    def _call(self, message: Message) -> Message:
        delivered = Message(over_the_wire(message.content), message.metadata.dst_node_id, message.metadata.message_type)
        delivered.metadata.__dict__["_message_id"] = f"m{len(self.sent)}"
        try:
            reply = self.app(delivered, self.contexts[message.metadata.dst_node_id])
        except Exception as exception:
            return Message(Error(2, f"{type(exception).__name__}: {exception}"), reply_to=delivered)
        if not reply.has_error():
            reply.content = over_the_wire(reply.content)
            try:
                unpack_content(reply.content)  # as a SuperLink's grid does
            except Exception as exception:
                return Message(Error(2, f"{type(exception).__name__}: {exception}"), reply_to=delivered)
        return reply

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def get_nodes(self) -> Iterator[Any]:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError
