"""LearningRateMonitor logs clients' rates, under the names that Lightning gives them."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    LearningRateMonitor,
)
from lightning.pytorch.loggers import CSVLogger

from lightning_fed.callbacks import (
    History,
)
from lightning_fed.testing import ToyModule
from tests.helpers import QUIET
from tests.integration.callbacks.runs import ENGINES, federated, loader, toy

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


class Scheduled(ToyModule):
    """Two optimizers' worth of names: a schedule by epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.8, momentum=0.5, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Groups(ToyModule):
    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "lr": 0.5}, {"params": self.net[2].parameters(), "name": "head"}]
        optimizer = torch.optim.Adam(groups, lr=0.25)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return [optimizer], [{"scheduler": scheduler, "name": "mine", "interval": "step"}]


def plain_names(module: L.LightningModule, tmp_path: Any, **options: Any) -> set[str]:
    monitor = LearningRateMonitor("epoch", **options)
    logger = CSVLogger(tmp_path, "plain")
    L.Trainer(max_epochs=1, callbacks=[monitor], **{**QUIET, "logger": logger}).fit(module, loader())
    return {*monitor.lrs, *(name for name in logger.experiment.metrics_keys if name.startswith(("lr-", "mine")))}


@pytest.mark.parametrize("engine", ENGINES)
def test_learning_rate_monitor_logs_the_clients_rates(tmp_path, engine):
    monitor, history, logger = LearningRateMonitor(), History(), CSVLogger(tmp_path)
    trainer = federated(monitor, history, rounds=3, client_state="global", logger=logger, engine=engine)
    trainer.fit(toy(cls=Scheduled), loader())
    assert history["lr-SGD"] == [0.8, 0.4, 0.2]
    assert monitor.lrs == {"lr-SGD": [0.8, 0.4, 0.2]}
    assert type(monitor) is LearningRateMonitor
    assert not any("ApplyWeights" in name for name in (*history.names, *trainer.callback_metrics))


@pytest.mark.parametrize("cls", [Scheduled, Groups, ToyModule])
@pytest.mark.parametrize("options", [{}, {"log_momentum": True, "log_weight_decay": True}], ids=["lr", "all"])
def test_learning_rates_have_lightnings_names(cls, options, tmp_path):
    expected = plain_names(toy(cls=cls), tmp_path, **options)
    history, monitor = History(), LearningRateMonitor(**options)
    trainer = federated(monitor, history, rounds=1, logger=CSVLogger(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*(does not have many|num_workers|have no `val|log_momentum|LeafSpec).*")
        trainer.fit(toy(cls=cls), loader())
    assert {name for name in history.names if name.startswith(("lr-", "mine"))} == expected
    assert {*monitor.lrs, *monitor.last_momentum_values, *monitor.last_weight_decay_values} == expected
    assert bool(monitor.last_momentum_values) is bool(monitor.last_weight_decay_values) is bool(options)
    assert not any(name.endswith(("-momentum", "-weight_decay")) for name in monitor.lrs)


@pytest.mark.parametrize(("optimizer", "momentum"), [("SGD", 0.9), ("Adagrad", 0.0)])
def test_only_an_optimizer_without_momentum_is_told_to_have_none(optimizer, momentum, tmp_path):
    class Own(ToyModule):
        def configure_optimizers(self):
            options = {"momentum": momentum} if momentum else {}
            return getattr(torch.optim, optimizer)(self.parameters(), lr=0.1, **options)

    history = History()
    trainer = federated(LearningRateMonitor(log_momentum=True), history, rounds=1, logger=CSVLogger(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(toy(cls=Own), loader())
    said = [one for one in caught if "some optimizers do not have momentum" in str(one.message)]
    assert bool(said) is (optimizer == "Adagrad")
    assert history[f"lr-{optimizer}-momentum"] == pytest.approx([momentum])


def test_learning_rates_of_clients_that_are_trained_as_one(tmp_path):
    history = History()
    trainer = federated(
        LearningRateMonitor(), history, logger=CSVLogger(tmp_path), vectorize_clients="require", client_state="global"
    )
    trainer.fit(toy(cls=Scheduled), loader())
    assert history["lr-SGD"] == [0.8, 0.4]


def test_learning_rate_monitor_of_the_modules_own_is_the_clients_too(tmp_path):
    history = History()
    trainer = federated(history, rounds=1, logger=CSVLogger(tmp_path))
    trainer.fit(toy(LearningRateMonitor(), cls=Scheduled), loader())
    assert history["lr-SGD"] == [0.8]


def test_learning_rate_monitor_without_a_logger_is_refused_as_by_a_trainer():
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException, match=r"LearningRateMonitor.* no logger"):
        federated(LearningRateMonitor()).fit(toy(), loader())
