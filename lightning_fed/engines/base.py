"""What an engine is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

T = TypeVar("T")


class Engine(ABC):
    """Runs ``main`` with a Flower ``Grid`` that reaches ``num_clients`` clients, each a ``client_app``.

    Some engines own the outer loop and hand us the grid, therefore ``run`` takes the loop as a function. The grid's
    ``send_and_receive`` may return an iterator that runs clients as it is read: then replies come in the order of the
    messages. ``lightning_fed.testing`` has the conformance cases that every engine passes.
    """

    name: str

    @property
    def shows_one_device(self) -> bool:
        """Whether each client sees one CUDA device only, whichever that is."""
        return False

    @abstractmethod
    def run(self, main: Callable[[Grid], T], client_app: ClientApp, num_clients: Callable[[], int]) -> T:
        """Runs ``main`` and returns what it returns.

        Args:
            main: The server's side, called once.
            client_app: The clients' side.
            num_clients: Tells the number of clients; the data may have to be opened for it, so an engine calls it as
                late as it can.
        """
