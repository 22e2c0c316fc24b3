"""A small federated fit of two clients, and what is noted in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import (
    Partition,
)
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET


def train(examples: int = 32, **options: Any) -> DataLoader:
    return DataLoader(toy_data(examples), **{"batch_size": 8, **options})


def val() -> DataLoader:
    return DataLoader(toy_data(16, seed=1), 8)


def toy(cls: type[ToyModule] = ToyModule, **hparams: Any) -> Any:
    torch.manual_seed(0)
    return cls(**hparams)


def federated(*callbacks: Callback, rounds: int | None = 3, held_out: bool = False, **options: Any) -> FederatedTrainer:
    """Two clients, no output."""
    dealt = any("partition" in getattr(callback, "decides", ()) for callback in callbacks)
    clients = [] if dealt else [Partition(2, val_fraction=0.25 if held_out else 0.0)]
    return FederatedTrainer(max_rounds=rounds, callbacks=[*clients, *callbacks], **{**QUIET, **options})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class Each(Callback):
    """Notes what ``what(trainer, module)`` gives at a hook."""

    def __init__(self, hook: str, what: Callable[[Any, Any], Any]) -> None:
        self.seen: list[Any] = []
        setattr(self, hook, lambda trainer, module, *args: self.seen.append(what(trainer, module)))

    def __deepcopy__(self, memo: Any) -> Each:
        return self  # also the clients' copies note it here


SCRIPT = [0.5, 0.1, 0.9, 0.7, 0.8, 0.6]


class Scripted(ToyModule):
    """Its metrics are those of ``SCRIPT``, by the round."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        self.log("scripted_train", SCRIPT[self.trainer.current_round - 1], on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_acc", SCRIPT[min(self.trainer.current_round, 6) - 1])
        self.log("val_loss", SCRIPT[min(self.trainer.current_round, 6) - 1])


class Whole(ToyModule):
    """Also tests and predicts."""

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(-1)
