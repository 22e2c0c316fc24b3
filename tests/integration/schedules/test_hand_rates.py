"""Learning rates that the user's code sets by hand: said where they are lost with a client's optimizers, else not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientData, PartialParticipation
from lightning_fed.engines import Engine, InProcess, Processes
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET


class WarmsUp(ToyModule):
    """As Lightning's documentation writes a warm-up: after the step."""

    def optimizer_step(self, epoch: Any, batch_idx: Any, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        if self.trainer.global_step < 17:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (self.trainer.global_step + 1) / 17


class SetsOnce(ToyModule):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.optimizers().param_groups[0]["lr"] *= 0.1


class ByHand(SetsOnce):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        self.optimizers().step()


class OnASchedule(WarmsUp):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 30), "interval": "step"}]


class SetsEach(ToyModule):
    """Before each step: right in any fit."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().param_groups[0]["lr"] = 0.1 * 0.9**self.trainer.global_step


class SetsEachEpoch(ToyModule):
    def on_train_epoch_start(self) -> None:
        self.optimizers().param_groups[0]["lr"] = 0.1 * 0.9**self.current_epoch


class Scheduled(ToyModule):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        by_epoch = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        by_step = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
        return [optimizer], [by_epoch, {"scheduler": by_step, "interval": "step"}]


class WritesItsStep(Scheduled):
    def optimizer_step(self, epoch: Any, batch_idx: Any, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)


class Backbone(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 8))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def said(build: Any, **options: Any) -> list[str]:
    """What is said of learning rates, by three rounds of clients of 8, 24 and 40 examples."""
    clients = ClientData([DataLoader(toy_data(n), 8) for n in (8, 24, 40)])
    callbacks = [clients, *options.pop("callbacks", ())]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FederatedTrainer(callbacks=callbacks, **{"max_rounds": 3, **QUIET, **options}).fit(build())
    return [str(one.message) for one in caught if "earning rate" in str(one.message)]


@pytest.mark.parametrize("engine", [InProcess(), Processes(2, start_method="fork")], ids=["in process", "processes"])
@pytest.mark.parametrize("build", [WarmsUp, SetsOnce, ByHand, OnASchedule])
def test_rates_set_by_hand_that_are_lost_are_said_once(build: Any, engine: Engine) -> None:
    (words,) = said(build, engine=engine)
    assert "client_state='carry'" in words
    assert "LambdaLR" in words
    lost = {WarmsUp: "with 0.00588235,", OnASchedule: "with 0.00588235,"}.get(build, "with 0.01,")
    assert lost in words
    assert "next one began with 0.1," in words


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (WarmsUp, {"client_state": "carry"}),
        (WarmsUp, {"client_state": "reset"}),
        (WarmsUp, {"max_rounds": 1}),
        (SetsEach, {}),
        (SetsEachEpoch, {"local_epochs": 2}),
        (Scheduled, {}),
        (WritesItsStep, {}),
        (WritesItsStep, {"callbacks": [PartialParticipation(fraction_train=0.4)], "max_rounds": 6}),
        (ToyModule, {}),
        (Backbone, {"client_callbacks": [BackboneFinetuning(unfreeze_backbone_at_epoch=1)]}),
    ],
)
def test_nothing_is_said_of_rates_that_are_not_lost(build: Any, options: Any) -> None:
    assert said(build, **options) == []
