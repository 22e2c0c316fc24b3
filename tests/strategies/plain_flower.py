"""Strategies driven as plain Flower drives them: ``strategy.start`` over a grid, clients that know nothing of ours."""

from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from tests.helpers import SuperLinkLike, in_flower

Weights = dict[str, Tensor]
SIZES = (1, 100, 3, 17)  # examples of each client


def noise(like: Tensor, *key: int) -> Tensor:
    """The same random tensor for the same key."""
    seed = sum(k * 1009**i for i, k in enumerate(key, 1))
    wide = torch.complex128 if like.is_complex() else torch.float64
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=wide).to(like.dtype)


def local_training(client: int, round: int, x: Weights) -> Weights:
    """What the clients do here: anything that depends on client, round and weights."""
    return {
        name: 0.9 * value + 0.3 * noise(value, client, round, i) + 0.1 * client
        for i, (name, value) in enumerate(sorted(x.items()))
    }


def clients(round: int, x: Weights) -> list[tuple[float, Weights]]:
    """The same for ``references.run_rounds``."""
    return [(n, local_training(client, round, x)) for client, n in enumerate(SIZES)]


def plain_client(train: Callable[[int, int, Weights], Weights] = local_training) -> ClientApp:
    """A ClientApp as Flower's own examples write it."""
    app = ClientApp()

    @app.train()
    def train_fn(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        x = message.content["arrays"].to_torch_state_dict()
        new = train(client, int(message.content["config"]["server-round"]), x)
        metrics = MetricRecord({"loss": 1.0 * client, "num-examples": SIZES[client]})
        return Message(RecordDict({"arrays": ArrayRecord(new), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate_fn(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        metrics = MetricRecord({"acc": 0.1 * client, "num-examples": SIZES[client]})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def start(
    strategy: Strategy, x: Weights, rounds: int = 3, app: ClientApp | None = None
) -> tuple[list[Weights], Result]:
    """``strategy.start`` as in a plain ServerApp; the weights after each round, and Flower's result."""
    after: list[Weights] = []

    def evaluate(round: int, arrays: ArrayRecord) -> None:
        if round:
            after.append({k: v.clone() for k, v in arrays.to_torch_state_dict().items()})

    grid = SuperLinkLike(app or plain_client(), {10 + k: {"partition-id": k} for k in range(len(SIZES))})
    result = in_flower(lambda: strategy.start(grid, ArrayRecord(x), num_rounds=rounds, evaluate_fn=evaluate))
    return after, result
