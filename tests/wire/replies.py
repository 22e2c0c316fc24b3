"""Rounds of four toy clients of which one sends what it likes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import Message, RecordDict

from lightning_fed.callbacks import FaultTolerance
from lightning_fed.testing import toy_weights
from lightning_fed.values.metrics import MEAN, MetricState
from lightning_fed.values.weights import Weights
from lightning_fed.wire import extras, messages
from tests.server.round_runs import Diary, client, run

WEIGHTS = {**toy_weights(), "steps": torch.tensor(10), "on": torch.tensor([True, False])}
HOSTILE = 2


def honest(k: int, message: Message) -> Message:
    """Client k adds k to all floating weights, and logs its number."""
    integers = extras.detach_integers(message)
    new = {name: tensor + k for name, tensor in messages.read_instruction(message).weights.items()}
    reply = messages.train_reply(message, new, k + 1, {"loss": float(k)})
    loss = MetricState("loss", MEAN, {"value": torch.tensor(float(k)), "weight": torch.tensor(1.0)})
    extras.attach(reply, extras.Extras(integers, [loss], ["said: by a client"]))
    return reply


def app(spoil: Callable[[Message], Message], hostile: int = HOSTILE):
    return client(lambda k, message: spoil(honest(k, message)) if k == hostile else honest(k, message))


def ended(spoil: Callable[[Message], Message], strategy: Any = None, hostile: int = HOSTILE, **options: Any) -> Any:
    """What a round gives, and which clients failed."""
    diary = Diary()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(
            app(spoil, hostile),
            strategy,
            weights=WEIGHTS,
            failures=FaultTolerance(min_results=3, on_error="ignore"),
            callbacks=[diary],
            **options,
        )
    return result, diary.errors


def same(result: Any, other: Any) -> bool:
    return all(torch.equal(result.weights[name], other.weights[name]) for name in WEIGHTS)


def content(change: Callable[[RecordDict], Any]) -> Callable[[Message], Message]:
    def spoil(reply: Message) -> Message:
        change(reply.content)
        return reply

    return spoil


def metrics(**numbers: Any) -> Callable[[Message], Message]:
    return content(lambda c: c["metrics"].update(numbers))


def tensors(change: Callable[[Weights], Weights]) -> Callable[[Message], Message]:
    return content(lambda c: c.__setitem__("arrays", messages.pack(change(messages.unpack(c["arrays"])))))
