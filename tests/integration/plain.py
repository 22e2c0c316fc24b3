"""Plain loops to compare with: torch alone for the algorithms, Flower alone for its strategies; nothing of ours."""

from __future__ import annotations

import copy
import itertools
import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor, nn

State = dict[str, Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]


# ------------------------------------------------------------------------------------------------- torch, from papers


def train_locally(
    net: nn.Module,
    batches: Batches,
    *,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    epochs: int = 1,
    steps: int | None = None,
    mu: float = 0.0,
) -> State:
    """Minimises ``F_k(w) + mu / 2 ||w - w_t||^2`` (Li et al. 2020, equation 2) from a copy of ``net``."""
    net = copy.deepcopy(net).train()
    start = [p.detach().clone() for p in net.parameters()]
    local = optimizer(net.parameters())
    for x, y in itertools.islice(itertools.cycle(batches), steps or epochs * len(batches)):
        local.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss = loss + mu / 2 * sum(((p - s) ** 2).sum() for p, s in zip(net.parameters(), start, strict=True))
        loss.backward()
        local.step()
    return net.state_dict()


def mean_of(states: Sequence[State], coefficients: Sequence[float]) -> State:
    """``sum_k (n_k / n) w_k`` (McMahan et al. 2017, Algorithm 1); integers are rounded."""
    total, mean = sum(coefficients), {}
    for name, like in states[0].items():
        value = sum(c / total * state[name].double() for c, state in zip(coefficients, states, strict=True))
        mean[name] = value.to(like.dtype) if like.is_floating_point() else value.round().to(like.dtype)
    return mean


class TakeMean:
    """FedAvg's server: the mean itself."""

    def step(self, name: str, x: Tensor, delta: Tensor) -> Tensor:
        return x + delta


class Momentum:
    """Hsu et al. 2019, section 3: ``v = beta v + (x - mean); x = x - eta v``."""

    def __init__(self, eta: float, beta: float) -> None:
        self.eta, self.beta, self.v = eta, beta, {}

    def step(self, name: str, x: Tensor, delta: Tensor) -> Tensor:
        self.v[name] = self.beta * self.v.get(name, 0.0) - delta
        return x - self.eta * self.v[name]


class Adaptive:
    """Reddi et al. 2021, Algorithm 2, with ``m_{-1} = 0`` and ``v_{-1} = tau^2``, line by line."""

    def __init__(self, kind: str, eta: float, beta_1: float, beta_2: float, tau: float) -> None:
        self.kind, self.eta, self.beta_1, self.beta_2, self.tau = kind, eta, beta_1, beta_2, tau
        self.m: State = {}
        self.v: State = {}

    def step(self, name: str, x: Tensor, delta: Tensor) -> Tensor:
        m = self.m.get(name, torch.zeros_like(x))
        v = self.v.get(name, torch.full_like(x, self.tau**2))
        m = self.beta_1 * m + (1 - self.beta_1) * delta
        if self.kind == "adagrad":
            v = v + delta**2
        elif self.kind == "yogi":
            v = v - (1 - self.beta_2) * delta**2 * torch.sign(v - delta**2)
        else:
            v = self.beta_2 * v + (1 - self.beta_2) * delta**2
        self.m[name], self.v[name] = m, v
        return x + self.eta * m / (torch.sqrt(v) + self.tau)


class ByRound:
    """A server's step with a learning rate for each round."""

    def __init__(self, server: Momentum | Adaptive, etas: Sequence[float]) -> None:
        self.server, self.etas = server, etas
        self.rounds: dict[str, int] = {}

    def step(self, name: str, x: Tensor, delta: Tensor) -> Tensor:
        done = self.rounds.get(name, 0)
        self.rounds[name], self.server.eta = done + 1, self.etas[done]
        return self.server.step(name, x, delta)


def federate(
    net: nn.Module,
    clients: Sequence[Batches],
    *,
    rounds: int,
    server: TakeMean | Momentum | Adaptive | ByRound,
    uniform: bool = False,
    **local: object,
) -> State:
    """Algorithm 1 of McMahan et al. 2017 with full participation; the server steps parameters, not buffers."""
    net = copy.deepcopy(net)
    parameters = {name for name, _ in net.named_parameters()}
    coefficients = [1 if uniform else sum(len(y) for _, y in batches) for batches in clients]
    for _ in range(rounds):
        before = {name: value.clone() for name, value in net.state_dict().items()}
        mean = mean_of([train_locally(net, batches, **local) for batches in clients], coefficients)
        net.load_state_dict(
            {
                name: server.step(name, before[name], value - before[name]) if name in parameters else value
                for name, value in mean.items()
            }
        )
    return net.state_dict()


# -------------------------------------------------------------------------------------------------------- Flower alone


@contextmanager
def flower_identity() -> Iterator[None]:
    """Who sends messages, which Flower's runtimes set in every process."""
    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 7, 7, 1
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


class ForeignGrid(Grid):
    """A Grid as somebody else may write it: random node ids, and a list of replies in arrival order."""

    def __init__(self, app: ClientApp, num_clients: int, seed: int = 0) -> None:
        self._random = random.Random(seed)
        nodes = [self._random.getrandbits(63) for _ in range(num_clients)]
        self._app, self._run = app, Run.create_empty(run_id=7)
        self.contexts = {
            node: Context(7, node, {"partition-id": client, "num-partitions": num_clients}, RecordDict(), {})
            for client, node in enumerate(nodes)
        }

    def client_of_node(self, node: int) -> int:
        return int(self.contexts[node].node_config["partition-id"])

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        nodes = list(self.contexts)
        self._random.shuffle(nodes)
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            content = copy.deepcopy(message.content)  # what a wire does
            delivered = make_message(metadata=message.metadata, content=content)
            reply = self._app(delivered, self.contexts[message.metadata.dst_node_id])
            reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            replies.append(reply)
        self._random.shuffle(replies)
        return replies


def flower_loop(
    strategy: Strategy,
    grid: ForeignGrid,
    weights: State,
    rounds: int,
    seed_round: Callable[[int], None] = lambda round: None,
) -> tuple[State, list[dict[str, float]]]:
    """What ``Strategy.start`` does: configure, send, aggregate; replies in client order.

    Returns the weights and each round's aggregated training metrics. ``seed_round`` is called before each round.
    """
    names = list(weights)
    arrays = ArrayRecord({name: array(tensor.numpy().copy()) for name, tensor in weights.items()})
    metrics = []
    for server_round in range(1, rounds + 1):
        seed_round(server_round)
        config = ConfigRecord({"server-round": server_round, "run-seed": 0})
        sent = sorted(
            strategy.configure_train(server_round, arrays, config, grid),
            key=lambda message: grid.client_of_node(message.metadata.dst_node_id),
        )
        state = random.getstate(), np.random.get_state()
        replies = grid.send_and_receive(sent)
        random.setstate(state[0])
        np.random.set_state(state[1])
        replies.sort(key=lambda reply: grid.client_of_node(reply.metadata.src_node_id))
        for reply in replies:
            assert not reply.has_error(), reply.error
            for key in [key for key in reply.content if key not in ("arrays", "metrics")]:
                del reply.content[key]
        arrays, record = strategy.aggregate_train(server_round, replies)
        assert arrays is not None
        metrics.append(dict(record or {}))
    return {name: torch.from_numpy(arrays[name].numpy()) for name in names}, metrics


def array(values: np.ndarray) -> Array:
    """Flower's own kind of array."""
    return Array(values)
