"""What a local fit held is free when it ends: it does not wait for a garbage collection of its trainer's cycles."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import lightning as L
import pytest
import torch

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FederatedCallback
from lightning_fed.client.local.method import LocalMethod
from tests.callbacks.rounds import loaders, sgd
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network

CLIENTS, ROUNDS = 3, 3


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Large(FederatedCallback):
    """A method whose local part has large tensors: some that the method gives it, and one of its own."""

    made: ClassVar[list[weakref.ref[Any]]] = []

    def local_callbacks(self) -> Sequence[L.Callback]:
        return [Local()]


class Local(LocalMethod):
    acts_elementwise = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.own = torch.zeros(10)
        self.memory = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        Large.made += map(weakref.ref, [self.own, *self.memory.values()])


class Holds(L.Callback):
    """A client callback that holds something large."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.own = torch.zeros(10)
        Large.made.append(weakref.ref(self.own))


@pytest.mark.parametrize("vectorized", [False, "require"])
def test_tensors_of_callbacks_are_free_after_each_local_fit(uncollected: None, vectorized: Any) -> None:
    Large.made.clear()
    alive = []

    class Watch(FederatedCallback):
        def on_round_end(self, trainer: Any, round: int, metrics: Any) -> None:
            alive.append(sum(one() is not None for one in Large.made))

    trainer = FederatedTrainer(
        max_rounds=ROUNDS,
        callbacks=[ClientData(loaders((8,) * CLIENTS)), Large(), Watch()],
        client_callbacks=[] if vectorized else [Holds()],
        vectorize_clients=vectorized,
        **QUIET,
    )
    trainer.fit(Classifier(network(torch.float64), sgd))
    assert len(Large.made) >= (ROUNDS if vectorized else ROUNDS * CLIENTS) * 2
    assert alive[0] == alive[-1]  # what was tried before the first round stays, once
    assert vectorized or alive[0] == 0
