"""Three rounds of unequal clients, part of whom take part: what tests of methods that correct drift have in common."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, FederatedCallback, PartialParticipation
from tests import references
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network

SIZES, ROUNDS, EPOCHS, BATCH = (6, 12, 22, 10), 3, 2, 4
COHORTS = [[0, 2, 3], [1, 2], [0, 1, 2, 3]]
WAYS: dict[str, dict[str, Any]] = {
    "vectorized": {"vectorize_clients": "require"},
    "processes": {"engine": "processes"},
    "vectorized on processes": {"engine": "processes", "vectorize_clients": "require"},
}
HOOKS = ["on_round_start", "on_client_end", "on_round_end"]

sgd = partial(torch.optim.SGD, lr=0.1)
momentum = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
adam = partial(torch.optim.Adam, lr=0.01)


class Chosen(PartialParticipation):
    """The cohorts above."""

    def size(self, stage: str, num_clients: int) -> int:
        return 2

    def sample(self, stage: str, round: int, num_clients: int, seed: int) -> list[int]:
        return COHORTS[round - 1]


def loaders(sizes: Sequence[int] = SIZES, dtype: torch.dtype = torch.float64) -> list[DataLoader[Any]]:
    """The clients' data."""
    generator = torch.Generator().manual_seed(11)
    made = []
    for client, size in enumerate(sizes):
        x = torch.randn(size, 6, generator=generator).to(dtype) + client
        y = (torch.randint(0, 3, (size,), generator=generator) + client) % 3
        made.append(DataLoader(TensorDataset(x, y), batch_size=BATCH))
    return made


def batches() -> list[list[Any]]:
    """``batches()[round][client]`` for references: all steps of a round, or ``None``."""
    data = [list(loader) * EPOCHS for loader in loaders()]
    return [[data[i] if i in cohort else None for i in range(len(SIZES))] for cohort in COHORTS]


def encoded(batch_norm: bool = False) -> nn.Sequential:
    """The network of all these tests, as an ``encoder`` and a ``head``."""
    *encoder, head = network(torch.float64, batch_norm)
    return nn.Sequential(OrderedDict(encoder=nn.Sequential(*encoder), head=head))


def loss(net: nn.Module, batch: Any) -> torch.Tensor:
    """The clients' loss."""
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def federated(net: nn.Module, optimizer: Any, *methods: Any, kind: Any = Classifier, **how: Any) -> references.Weights:
    """The network's weights after the rounds."""
    module = kind(copy.deepcopy(net), optimizer)
    callbacks = [ClientData(loaders()), Chosen(), *methods]
    FederatedTrainer(max_rounds=ROUNDS, local_epochs=EPOCHS, callbacks=callbacks, **how, **QUIET).fit(module)
    return module.net.state_dict()


def assert_close(ours: references.Weights, theirs: references.Weights, rtol: float = 1e-9) -> None:
    """All tensors are equal but for rounding."""
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=1e-12, msg=lambda text: f"{name}: {text}")


def assert_equal(ours: references.Weights, theirs: references.Weights) -> None:
    """All tensors are equal, bit for bit."""
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


class UnfreezesLate(L.Callback):
    """On clients: the first layer is frozen when a fit begins, and trains from the start of one of its epochs on."""

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[0].requires_grad_(False)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch % EPOCHS == self.epoch:
            pl_module.net[0].requires_grad_(True)


class Stops(FederatedCallback):
    """Raises once, when a hook is called in a round."""

    def __init__(self, hook: str, round: int = 3) -> None:
        setattr(self, hook, self._stop)
        self.round, self.is_over = round, False

    def _stop(self, trainer: Any, round: int, *rest: Any) -> None:
        if round == self.round and not self.is_over:
            self.is_over = True
            raise RuntimeError("stopped")


def assert_resumes(
    folder: Path, hook: str, optimizer: Any, method: Callable[[], FederatedCallback], kind: Any = Classifier, **how: Any
) -> None:
    """A run that is stopped in the last round ends, resumed by a new method and module, as one that never was."""
    net = network(torch.float64)
    whole, stops = federated(net, optimizer, method(), kind=kind, **how), Stops(hook)

    def fit(module: Any, ckpt_path: str | None = None) -> None:
        callbacks = [ClientData(loaders()), Chosen(), method(), stops, OnExceptionCheckpoint(folder)]
        arguments = {**QUIET, **how, "enable_checkpointing": True}
        trainer = FederatedTrainer(max_rounds=ROUNDS, local_epochs=EPOCHS, callbacks=callbacks, **arguments)
        trainer.fit(module, ckpt_path=ckpt_path)

    with pytest.raises(RuntimeError, match="stopped"):
        fit(kind(copy.deepcopy(net), optimizer))
    module = kind(network(torch.float64), optimizer)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    fit(module, str(folder / "on_exception.ckpt"))
    assert_equal(module.net.state_dict(), whole)
