"""ReduceLROnPlateau: where it has a place, and what it has to see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lightning_fed import ClientError, ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import FaultTolerance, History, Partition
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET
from tests.integration.schedules.runs import BATCHES, ByHand, Seen, built, federated, rates, warned


class Watches(ToyModule):
    """A ReduceLROnPlateau that watches what ``logs`` logs, or does not."""

    def __init__(self, logs: str = "train_loss", strict: bool = True, interval: str = "epoch", **options: Any) -> None:
        super().__init__()
        self.logs, self.options = logs, {"patience": 0, "factor": 0.5, **options}
        self.config = {"strict": strict, "interval": interval, "monitor": "watched"}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.logs == "train" or (self.logs == "late" and batch_idx == BATCHES - 1):
            self.log("watched", 1.0)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.logs == "validation":
            self.log("watched", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, **self.options)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.config}}


def watching(logs: str, rounds: int = 2, strict: bool = True, interval: str = "epoch", **options: Any) -> Any:
    seen, history = Seen(), History()
    callbacks = [Partition(1, val_fraction=0.2), FaultTolerance(1), history]
    trainer = FederatedTrainer(max_rounds=rounds, callbacks=callbacks, client_callbacks=[seen], **{**QUIET, **options})
    try:
        trainer.fit(built(lambda: Watches(logs, strict, interval)), DataLoader(toy_data(50), 8))
    except Exception:
        assert history.rows == []
        raise
    return rates(seen.seen)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("logs", ["train", "nothing"])
def test_a_plateau_has_no_place_in_the_global_round(logs: str, strict: bool) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"configure_optimizers gives a ReduceLROnPlateau.*no schedule.*FederatedTrainer\(client_state='carry'\)",
    ):
        watching(logs, strict=strict)


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("logs", ["nothing", "validation"])
@pytest.mark.parametrize("client_state", ["carry", "reset"])
@pytest.mark.filterwarnings("ignore:client_state='reset' begins schedules anew")
def test_a_plateau_that_cannot_see_its_metric_is_refused_before_round_1(
    logs: str, strict: bool, client_state: Any, interval: str
) -> None:
    match = r"A client has a ReduceLROnPlateau that monitors 'watched', which.*local_validation=True"
    with pytest.raises(ConfigurationError, match=match):
        watching(logs, strict=strict, client_state=client_state, interval=interval)


@pytest.mark.parametrize(("logs", "options"), [("train", {}), ("late", {}), ("validation", {"local_validation": True})])
@pytest.mark.parametrize("strict", [True, False])
def test_a_plateau_that_sees_its_metric_goes_on_with_the_client(logs: str, options: Any, strict: bool) -> None:
    seen = watching(logs, rounds=4, strict=strict, client_state="carry", **options)
    assert seen[-4 * BATCHES :: BATCHES] == [0.1, 0.1, 0.05, 0.025]


def test_a_metric_that_is_missing_in_a_later_round_is_an_error_of_its_client() -> None:
    class Forgets(Watches):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.logs = "train" if self.trainer.current_round == 1 else "nothing"
            return super().training_step(batch, batch_idx)

    with pytest.raises(ClientError, match=r"Round 2, train: client 0 has a ReduceLROnPlateau that monitors 'watched'"):
        federated(Forgets, 3, client_state="carry")


def test_a_plateau_fits_into_one_round() -> None:
    assert watching("train", rounds=1, local_epochs=3)[::BATCHES] == [0.1, 0.1, 0.05]
    with pytest.raises(ConfigurationError, match="monitors 'watched'"):
        watching("nothing", rounds=1, local_epochs=3)


class PlateauByHand(ByHand):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [lr_scheduler.ReduceLROnPlateau(optimizer)]


def test_a_plateau_stepped_by_hand_has_no_place_either() -> None:
    with pytest.raises(ConfigurationError, match=r"a ReduceLROnPlateau.*client_state='carry'"):
        federated(lambda: PlateauByHand(lambda module, i: False), 2)


@pytest.mark.parametrize(("local_epochs", "still"), [(1, True), (3, True), (4, False)])
def test_with_reset_a_plateau_that_never_reduces_is_said(local_epochs: int, still: bool) -> None:
    said = warned(lambda: Watches("train", patience=1), local_epochs=local_epochs)
    assert len(said) == still
    seen = federated(lambda: Watches("train", patience=1), 1, client_state="reset", local_epochs=local_epochs)
    assert (len(set(rates(seen))) == 1) == still
