"""Toys for tests of federated code, and the cases that every engine must pass.

For an engine of your own::

    @pytest.mark.parametrize("case", ENGINE_CASES, ids=lambda case: case.__name__)
    def test_engine(case):
        case(MyEngine())
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed.engines import Engine
from lightning_fed.trainer import FederatedTrainer
from lightning_fed.values.weights import Weights
from lightning_fed.wire import messages


class ToyModule(LightningModule):
    """A small classifier with 8 inputs and 2 classes that logs a loss and an accuracy."""

    def __init__(self, hidden: int = 8, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (batch, 2)."""
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy, logged as ``train_loss``."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_acc``."""
        logits = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


def toy_data(examples: int = 96, seed: int = 0) -> TensorDataset:
    """Return inputs (examples, 8) float32 and labels (examples,) int64 that ``ToyModule`` can learn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 8, generator=generator)
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def toy_weights() -> Weights:
    """Return weights of several dtypes and shapes, bfloat16 and a scalar among them."""
    return {
        "matrix": torch.arange(6.0).reshape(2, 3),
        "narrow": torch.tensor([1.0, 3.140625, -2.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }


def _weights_in(message: Message) -> Weights:
    record = messages.first(message.content, ArrayRecord)
    assert record is not None
    return messages.unpack(record)


def counting_client() -> ClientApp:
    """Build clients: ``k`` adds ``k + 1`` to all it gets, counts ``k + 1`` examples, and counts its calls."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config[messages.CLIENT])
        kept = context.state.get("calls", ConfigRecord({"n": 0}))
        calls = int(cast(int, kept["n"])) + 1
        context.state["calls"] = ConfigRecord({"n": calls})
        got = _weights_in(message)
        added = {name: tensor + (client + 1) for name, tensor in got.items()}
        return messages.train_reply(message, added, client + 1, {"client": client, "calls": calls})

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return messages.evaluate_reply(message, 1, {"client": float(context.node_config[messages.CLIENT])})

    return app


def scribbling_client() -> ClientApp:
    """Return a client that replies with what it got, and before that writes into everything it got."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record = message.content[messages.ARRAYS]
        assert isinstance(record, ArrayRecord)
        got = {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
        reply = messages.train_reply(message, got, 1, {})
        for name in list(record):
            record[name].numpy()[...] = -1
            record[name].data = record[name].data[:-1] + b"\xff"
            record[f"{name}/new"] = record.pop(name)
        for config in message.content.config_records.values():
            config.clear()
        message.content.clear()
        return reply

    return app


def failing_client(fails: Callable[[int], bool]) -> ClientApp:
    """Build clients that raise ``ValueError("client k fails")`` where ``fails(k)``, else do as ``counting_client``."""
    app, counting = ClientApp(), counting_client()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config[messages.CLIENT])
        if fails(client):
            raise ValueError(f"client {client} fails")
        return counting(message, context)

    return app


def slow_client(slow: int, seconds: float) -> ClientApp:
    """Build clients of which one takes its time, and which else do as ``counting_client``."""
    app, counting = ClientApp(), counting_client()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config[messages.CLIENT] == slow:
            time.sleep(seconds)
        return counting(message, context)

    return app


def _messages_to(nodes: Sequence[int], kind: str = MessageType.TRAIN, weights: Weights | None = None) -> list[Message]:
    """Return messages with one shared RecordDict, as Flower's strategies make them."""
    arrays = messages.pack(toy_weights() if weights is None else weights)
    record = RecordDict({messages.ARRAYS: arrays, messages.CONFIG: messages.round_config(1, 0)})
    return [Message(record, node_id, kind) for node_id in nodes]


def send(grid: Grid, kind: str = MessageType.TRAIN, weights: Weights | None = None) -> list[Message]:
    """Send one shared RecordDict to every node, and collect the replies by node."""
    sent = _messages_to(sorted(grid.get_node_ids()), kind, weights)
    return sorted(grid.send_and_receive(sent), key=lambda reply: reply.metadata.src_node_id)


def _metric(reply: Message, name: str) -> Any:
    record = reply.content[messages.METRICS]
    assert isinstance(record, MetricRecord)
    return record[name]


def case_main_returns(engine: Engine) -> None:
    """Check that what main returns comes back; what it raises, too."""
    assert engine.run(lambda grid: len(list(grid.get_node_ids())), counting_client(), lambda: 3) == 3

    def stop(grid: Grid) -> None:
        raise LookupError("from main")

    with suppress(LookupError):
        engine.run(stop, counting_client(), lambda: 1)
        raise AssertionError("main raised, and run did not")


def case_every_client_answers(engine: Engine) -> None:
    """Check that each client gets the weights once, knows who it is, and replies with its own work."""
    replies = engine.run(send, counting_client(), lambda: 4)
    assert sorted(_metric(reply, "client") for reply in replies) == [0, 1, 2, 3]
    for reply in replies:
        got = _weights_in(reply)
        for name, tensor in toy_weights().items():
            expected = tensor + (_metric(reply, "client") + 1)
            assert torch.equal(got[name].to(tensor.dtype), expected), name


def case_evaluates(engine: Engine) -> None:
    """Check that evaluate messages reach the evaluate function."""
    replies = engine.run(lambda grid: send(grid, MessageType.EVALUATE), counting_client(), lambda: 2)
    assert sorted(_metric(reply, "client") for reply in replies) == [0, 1]


def case_state_stays_with_the_client(engine: Engine) -> None:
    """Check that a client's Context lives from round to round, and is its own."""

    def main(grid: Grid) -> list[Any]:
        list(grid.send_and_receive(_messages_to(sorted(grid.get_node_ids())[:1], weights={})))
        return sorted(_metric(reply, "calls") for reply in send(grid))

    assert engine.run(main, counting_client(), lambda: 3) == [1, 1, 2]


def case_scribbling_changes_nobody(engine: Engine) -> None:
    """Check that a client that writes into what it got changes no other client's weights and not the server's."""
    weights = toy_weights()
    replies = engine.run(lambda grid: send(grid, weights=weights), scribbling_client(), lambda: 3)
    for reply in replies:
        assert not reply.has_error(), reply.error
        got = _weights_in(reply)
        assert all(torch.equal(got[name].to(tensor.dtype), tensor) for name, tensor in toy_weights().items())
    assert all(torch.equal(weights[name], tensor) for name, tensor in toy_weights().items())


def case_failure_is_a_reply(engine: Engine) -> None:
    """Check that a client that raises replies with its error, and the others are not touched."""
    replies = engine.run(send, failing_client(lambda client: client == 1), lambda: 3)
    failed = [reply for reply in replies if reply.has_error()]
    assert len(replies) == 3
    assert len(failed) == 1
    assert "client 1 fails" in str(failed[0].error.reason)


def case_replies_come_in_order(engine: Engine) -> None:
    """Check that replies that are read one by one come in the order of the messages, whoever is slow."""

    def main(grid: Grid) -> tuple[list[int], list[int]]:
        nodes = sorted(grid.get_node_ids())
        asked = [nodes[i] for i in (2, 0, 3, 1)]
        replies = grid.send_and_receive(_messages_to(asked))
        came = [reply.metadata.src_node_id for reply in replies]
        return asked, sorted(came, key=asked.index) if isinstance(replies, list) else came

    asked, came = engine.run(main, slow_client(2, seconds=0.3), lambda: 4)
    assert came == asked


def _fitted(engine: str | Engine) -> dict[str, Tensor]:
    """Return the state dict after a fit that draws: shuffled batches, dropout."""
    torch.manual_seed(0)
    module = ToyModule()
    module.net.append(nn.Dropout(0.3))
    trainer = FederatedTrainer(
        max_rounds=2,
        num_clients=3,
        engine=engine,
        seed=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(toy_data(), batch_size=8, shuffle=True))
    return module.state_dict()


def case_fits_as_one_process(engine: Engine) -> None:
    """Check that a fit with dropout and shuffled batches gives the weights of ``engine="in_process"`` to the bit."""
    expected = _fitted("in_process")
    for name, tensor in _fitted(engine).items():
        assert torch.equal(tensor, expected[name]), name


ENGINE_CASES: list[Callable[[Engine], None]] = [
    case_main_returns,
    case_every_client_answers,
    case_evaluates,
    case_state_stays_with_the_client,
    case_scribbling_changes_nobody,
    case_failure_is_a_reply,
    case_replies_come_in_order,
    case_fits_as_one_process,
]
