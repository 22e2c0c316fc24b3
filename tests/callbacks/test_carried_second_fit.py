"""With ``client_state="carry"`` the fit of a client's own model goes on with its optimizer and its schedules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import nn

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import APFL, ClientData, Ditto
from tests.callbacks.rounds import (
    COHORTS,
    EPOCHS,
    ROUNDS,
    WAYS,
    Chosen,
    Stops,
    adam,
    assert_close,
    assert_equal,
    loaders,
    loss,
    momentum,
)
from tests.helpers import QUIET
from tests.integration.test_algorithms import Classifier, network


class Decays(Classifier):
    """Halves its learning rate after each epoch, of momentum or of Adam."""

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Plateau(Classifier):
    """Halves its learning rate after each epoch in which its loss has not halved."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        value = loss(self.net, batch)
        self.log("followed", value)
        return value

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "followed"}}


def fit(net: nn.Module, *callbacks: Any, kind: Any = Decays, optimizer: Any = momentum, **how: Any) -> Any:
    """The trainer after the rounds."""
    path = how.pop("ckpt_path", None)
    how = {**QUIET, "client_state": "carry", "max_rounds": ROUNDS, "local_epochs": EPOCHS, **how}
    trainer = FederatedTrainer(callbacks=[ClientData(loaders()), Chosen(), *callbacks], **how)
    trainer.fit(kind(copy.deepcopy(net), optimizer), ckpt_path=path)
    return trainer


def own(trainer: FederatedTrainer) -> list[Any]:
    """Each client's own model."""
    return [trainer.personal_module(client).net.state_dict() for client in range(len(loaders()))]


def long_fit(net: nn.Module, client: int, optimizer_of: Any, kind: Any) -> Any:
    """What one fit of a client alone over all its rounds' epochs gives, in plain torch."""
    net = copy.deepcopy(net)
    optimizer = optimizer_of(net.parameters())
    schedule: Any = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    if kind is Plateau:
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
    for _ in range(EPOCHS * sum(client in cohort for cohort in COHORTS)):
        for batch in loaders()[client]:
            optimizer.zero_grad()
            (last := loss(net, batch)).backward()
            optimizer.step()
        schedule.step(*([last.detach()] if kind is Plateau else []))
    return net.state_dict()


# With lam 0, and with alpha 1, a client's own model follows its own gradients alone.
ALONE = {"Ditto": Ditto(0.0), "APFL": APFL(1.0, adaptive=False)}


@pytest.mark.parametrize("optimizer", [momentum, adam], ids=["momentum", "Adam"])
@pytest.mark.parametrize("kind", [Decays, Plateau])
@pytest.mark.parametrize("method", ALONE)
def test_a_client_that_trains_alone_has_one_long_fit(method: str, kind: Any, optimizer: Any) -> None:
    net = network(torch.float64)
    trainer = fit(net, ALONE[method], kind=kind, optimizer=optimizer)
    # Clients 0, 2 and 3 have their first model from the first weights.
    for client in COHORTS[0]:
        assert_close(own(trainer)[client], long_fit(net, client, optimizer, kind))


@pytest.mark.parametrize("way", ["in process", "processes", "in files"])
@pytest.mark.parametrize("method", [Ditto, APFL])
def test_a_run_that_is_stopped_in_a_round_goes_on_bit_for_bit(method: Any, way: str, tmp_path: Path) -> None:
    net = network(torch.float64)
    whole = fit(net, method())
    how = {**WAYS.get(way, {}), "enable_checkpointing": True, "default_root_dir": str(tmp_path)}
    how |= {"client_storage": str(tmp_path / "clients")} if way == "in files" else {}
    stops, saves = Stops("on_client_end"), OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(net, method(), stops, saves, **how)
    trainer = fit(net, method(), stops, saves, ckpt_path=str(tmp_path / "on_exception.ckpt"), **how)
    for one, other in zip(own(trainer), own(whole), strict=True):
        assert_equal(one, other)
