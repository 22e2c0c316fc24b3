"""Clients that fail in their own ways, messages to them, and fits with them."""

import os
import signal

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.engines import Processes
from lightning_fed.testing import ToyModule, counting_client, toy_data, toy_weights
from lightning_fed.wire import messages
from lightning_fed.wire.messages import CLIENT
from tests.helpers import QUIET


def train_messages(grid, nodes=None) -> list[Message]:
    record = RecordDict({"arrays": messages.pack(toy_weights()), "config": messages.round_config(1, 0)})
    return [Message(record, node, MessageType.TRAIN) for node in nodes or grid.get_node_ids()]


def client_that(act) -> ClientApp:
    """A counting client that does something first, given its index."""
    app, counting = ClientApp(), counting_client()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        act(int(context.node_config[CLIENT]))
        return counting(message, context)

    return app


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(ToyModule):
    """Its process dies when client 2 trains in round 2."""

    def on_train_start(self) -> None:
        if (self.trainer.client_id, self.trainer.current_round) == (2, 2):
            die()


def fit(module, *callbacks, rounds=3, **options):
    arguments = {"engine": Processes(2, start_method="fork"), "num_clients": 4, **QUIET, **options}
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=list(callbacks), **arguments)
    trainer.fit(module, DataLoader(toy_data(64), batch_size=8, shuffle=True))
    return trainer


class KeywordOnly(Exception):
    """Can be pickled and not read back."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


class Otherwise(Exception):
    """Reads back with other words."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")


class Picky(ToyModule):
    """Client 1 raises in round 2."""

    error: type[Exception] = KeywordOnly

    def on_train_start(self) -> None:
        if (self.trainer.client_id, self.trainer.current_round) == (1, 2):
            raise KeywordOnly(code=7) if self.error is KeywordOnly else self.error(7)
