"""What an engine is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from lightning_fed._compat.flower import Run

T = TypeVar("T")


class ClientGrid(Grid):
    """A Grid that knows its clients by number, and what they keep; the node ids of clients ``0..n-1`` are ``1..n``.

    What the server uses beyond Flower's ``Grid``. On another it asks the nodes who they are, and its checkpoints have
    no client states.

    Args:
        run: Flower's description of the run.
        num_clients: Tells the number of clients.
    """

    def __init__(self, run: Run, num_clients: Callable[[], int]) -> None:
        self._run, self._count = run, num_clients

    def gather(self, question: Callable[[], RecordDict]) -> None:
        """Wait until the clients are there, where they come from elsewhere.

        Args:
            question: Makes what each is asked: who it is, and whether it is set up as the server is.
        """

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return self._count()

    def node_of(self, client: int) -> int:
        """Return Flower's address of a client."""
        return client + 1

    def client_of(self, node_id: int) -> int:
        """Return the client at one of Flower's addresses."""
        return node_id - 1

    @abstractmethod
    def begin_round(self) -> None:
        """Remember what clients keep as it is now."""

    @abstractmethod
    def undo(self, client: int) -> None:
        """Let a client keep what it kept when the round began: its work in this one does not count."""

    @abstractmethod
    def client_states(self, *, before_round: bool = False) -> dict[int, RecordDict]:
        """Return what clients keep from round to round, by client; those that keep nothing are left out.

        Args:
            before_round: What they kept when ``begin_round`` was called last.
        """

    def saved_at(self, path: str) -> None:
        """Note where the checkpoint is that has what ``client_states`` gave last."""

    @abstractmethod
    def load_client_states(self, states: dict[int, RecordDict]) -> None:
        """Take back what ``client_states`` gave."""

    def get_node_ids(self) -> Iterable[int]:
        """Return the addresses of all clients."""
        return range(1, self.num_clients + 1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Do as ``Message(...)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Run) -> None:
        """Take Flower's description of the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._run


class LocalGrid(ClientGrid):
    """A Grid whose clients are in this process, or get all that they have from it: module, data and state."""

    @abstractmethod
    def keep_in(self, folder: Path) -> None:
        """Keep what clients keep in files of a folder, from now on; called before the first round.

        Raises:
            ConfigurationError: If it cannot be used.
        """

    @abstractmethod
    def state_of(self, client: int, *, before_round: bool = False) -> RecordDict:
        """Return what a client keeps, to be read; arguments as for ``client_states``."""


class Engine(ABC):
    """Runs ``main`` with a Flower ``Grid`` that reaches ``num_clients`` clients, each a ``client_app``.

    Some engines own the outer loop and hand us the grid, therefore ``run`` takes the loop as a function. The grid's
    ``send_and_receive`` may return an iterator that runs clients as it is read: then replies come in the order of the
    messages. ``lightning_fed.testing`` has the conformance cases that every engine passes.
    """

    name: str
    #: Whether it gives the client app several messages at once, so that clients can be vectorized.
    can_vectorize = True
    #: Whether all clients train on the first CUDA device.
    uses_first_device = False

    @property
    def processes(self) -> int:
        """How many processes share this machine's memory; 1 where that is not known."""
        return 1

    @property
    def shows_one_device(self) -> bool:
        """Whether each client sees one CUDA device only, whichever that is."""
        return False

    @abstractmethod
    def run(self, main: Callable[[Grid], T], client_app: ClientApp, num_clients: Callable[[], int]) -> T:
        """Run ``main`` and return what it returns.

        Args:
            main: The server's side, called once.
            client_app: The clients' side.
            num_clients: Tells the number of clients; the data may have to be opened for it, so an engine calls it as
                late as it can.
        """
