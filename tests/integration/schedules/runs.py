"""Modules with schedules; what a long fit of a plain Trainer sees of them, and what a client sees."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData
from lightning_fed.callbacks.base import CohortOwner
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET

BATCHES = 5


PLAIN = {**QUIET, "limit_val_batches": 0}


# All of torch's that a schedule of its own moves; each over a horizon that the tests cross or not.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda n: 1 / (1 + n)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda n: 0.9 + 0.01 * (n % 3)),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.3),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3, 3, 8], gamma=0.3),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.3, total_iters=3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.2, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.7),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=7, power=1.5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=4, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=2, T_mult=2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.5, step_size_up=3, mode="triangular2"),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.5, total_steps=200),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(opt, T_max=20)],
        milestones=[2],
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.9)], optimizer=opt
    ),
}


class Scheduled(ToyModule):
    """Two groups with options of their own, and one schedule."""

    def __init__(self, scheduler: str, interval: str = "epoch", frequency: int = 1) -> None:
        super().__init__()
        self.scheduler, self.interval, self.frequency = scheduler, interval, frequency

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "lr": 0.2}, {"params": self.net[2].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[self.scheduler](optimizer)
        config = {"scheduler": scheduler, "interval": self.interval, "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Seen(Callback):
    """Notes at each batch when it is, and all options of all optimizers."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        options = [
            {key: value for key, value in group.items() if key != "params"}
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]
        when = getattr(trainer, "current_round", 1), trainer.current_epoch
        # What is asked for has to be known: where the module steps by hand that takes a second fit.
        step = trainer.global_step if pl_module.automatic_optimization else None
        self.seen.append((*when, step, options))

    def __deepcopy__(self, memo: Any) -> Seen:
        return self  # also the clients' copies note it here


class FromRound(CohortOwner):
    """Client 0 trains until a round, and client 1 from it on."""

    def __init__(self, round: int) -> None:
        super().__init__()
        self.round = round

    def sample(self, stage: Any, round: int, num_clients: int, seed: int) -> list[int]:
        return [int(round >= self.round)]


def loader(batches: int = BATCHES) -> DataLoader:
    return DataLoader(toy_data(8 * batches), 8)


def built(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build()


def long_fit(
    build: Callable[[], Any], epochs: int = -1, steps: int = -1, data: Any = None, **options: Any
) -> list[Any]:
    """What a plain Trainer sees at each batch: (1, epoch, global step, options)."""
    seen = Seen()
    callbacks = [seen, *options.pop("callbacks", ())]
    trainer = L.Trainer(max_epochs=epochs, max_steps=steps, callbacks=callbacks, **{**PLAIN, **options})
    trainer.fit(built(build), loader() if data is None else data)
    return seen.seen


def federated(
    build: Callable[[], Any],
    rounds: int,
    data: Any = None,
    late: int | None = None,
    callbacks: Any = (),
    **options: Any,
) -> list[Any]:
    """What a client sees at each batch, of the only one, or of one that takes part from round ``late`` on."""
    seen = Seen()
    data = loader() if data is None else data
    clients, more = [data], list(callbacks)
    if late is not None:
        clients, more = [loader(2), data], [FromRound(late), *more]
    client_callbacks = [seen, *options.pop("client_callbacks", ())]
    trainer = FederatedTrainer(
        max_rounds=rounds, callbacks=[ClientData(clients), *more], client_callbacks=client_callbacks, **QUIET, **options
    )
    trainer.fit(built(build))
    return [what for what in seen.seen if late is None or what[0] >= late]


def from_round(seen: list[Any], round: int, batches: int) -> list[Any]:
    return seen[(round - 1) * batches :]


def when_and_what(seen: list[Any]) -> list[Any]:
    """Without the round's number."""
    return [what[1:] for what in seen]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(toy_data(16))


class ByHand(ToyModule):
    """Manual optimization; ``when(module, batch_idx)`` says when its schedule is stepped."""

    def __init__(self, when: Callable[[Any, int], bool], at_epoch_end: bool = False, config: Any = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.when, self.at_epoch_end, self.config = when, at_epoch_end, config or {}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()
        if not self.at_epoch_end and self.when(self, batch_idx):
            self.lr_schedulers().step()

    def on_train_epoch_end(self) -> None:
        if self.at_epoch_end and self.when(self, 0):
            self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.9), **self.config}]


def rates(seen: list[Any]) -> list[float]:
    return [what[-1][0]["lr"] for what in seen]


HANDS: dict[str, Callable[[], ByHand]] = {
    "each batch": lambda: ByHand(lambda module, i: True),
    "each batch, declared": lambda: ByHand(lambda module, i: True, config={"interval": "step"}),
    "every second batch": lambda: ByHand(lambda module, i: i % 2 == 1),
    "every second batch, declared": lambda: ByHand(
        lambda module, i: i % 2 == 1, config={"interval": "step", "frequency": 2}
    ),
    "last batch": lambda: ByHand(lambda module, i: module.trainer.is_last_batch),
    "each epoch": lambda: ByHand(lambda module, i: True, at_epoch_end=True),
    "every second epoch, declared": lambda: ByHand(
        lambda module, i: module.current_epoch % 2 == 1, at_epoch_end=True, config={"frequency": 2}
    ),
    "each batch, in a word of its own": lambda: ByHand(lambda module, i: True, config={"interval": "batch"}),
    "each batch, but declared otherwise": lambda: ByHand(
        lambda module, i: True, config={"interval": "step", "frequency": 5}
    ),
}


def warned(build: Callable[[], Any], **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        federated(build, **{"rounds": 3, "client_state": "reset", **options})
    return [str(one.message) for one in caught if "client_state='reset'" in str(one.message)]
