"""Loggers get what a plain Trainer's loggers get: once a round, under the names that Lightning gives them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import ClientMetrics, FederatedCallback, History, Partition
from lightning_fed.engines import InProcess, Processes
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


def loader(examples: int = 48) -> DataLoader[Any]:
    return DataLoader(toy_data(examples), batch_size=8)


class Logs(ToyModule):
    """Logs in all the ways that there are."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("silent", loss, logger=False)
        self.log("silent_both", loss, logger=False, on_step=True, on_epoch=True)
        self.log("step", loss)
        self.log("epoch", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("v_both", loss, on_step=True, on_epoch=True)
        self.log("v_silent", loss, logger=False)
        self.log("v_epoch", loss)


class LogsMetrics(Logs):
    """And metric objects."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=2)
        self.hidden = torchmetrics.Accuracy("multiclass", num_classes=2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.hidden(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("hidden", self.hidden, on_step=False, on_epoch=True, logger=False)
        return super().training_step(batch, batch_idx)


def columns(logger: CSVLogger) -> set[str]:
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return set(next(csv.reader(file))) - {"epoch", "step"}


def plain(module: L.LightningModule, folder: Path) -> tuple[set[str], set[str]]:
    """What a plain Trainer gives its logger, and its callbacks."""
    logger = CSVLogger(folder, "plain")
    trainer = L.Trainer(max_epochs=1, log_every_n_steps=1, **{**QUIET, "logger": logger})
    trainer.fit(module, loader(), loader(8))
    # Steps of a validation are logged beside it; a round has none.
    return {name for name in columns(logger) if not name.startswith("v_both_step")}, set(trainer.callback_metrics)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Logs, {}),
        (LogsMetrics, {}),
        (LogsMetrics, {"engine": Processes(2, start_method="fork")}),
        (Logs, {"vectorize_clients": "require"}),
    ],
    ids=["numbers", "metrics", "processes", "vectorized"],
)
def test_a_logger_gets_what_a_plain_trainer_s_gets(cls, options, tmp_path):
    expected, for_callbacks = plain(cls(), tmp_path)
    logger, history = CSVLogger(tmp_path, "federated"), History()
    trainer = FederatedTrainer(
        max_rounds=2, callbacks=[Partition(2, val_fraction=0.25), history], **{**QUIET, "logger": logger, **options}
    )
    trainer.fit(cls(), loader(), loader(8))
    found = {name for name in columns(logger) if not name.startswith(("clients/", "v_both_step"))}
    assert found == expected
    assert {name for name in columns(logger) if name.startswith("clients/")} == {
        f"clients/{name}" for name in expected if name.startswith("v_")
    } | {name for name in columns(logger) if name == "clients/v_both_step"}
    assert for_callbacks <= set(trainer.callback_metrics)
    assert {"silent", "both", "clients/v_silent", "clients/v_both"} <= set(history.names)


@pytest.mark.parametrize("options", [{}, {"vectorize_clients": "require"}], ids=["alone", "vectorized"])
def test_the_bar_shows_what_the_user_wants_there_and_all_where_nothing_is_wanted(options):
    def bar(cls: type[ToyModule]) -> set[str]:
        trainer = FederatedTrainer(max_rounds=1, callbacks=[Partition(2, val_fraction=0.25)], **{**QUIET, **options})
        trainer.fit(cls(), loader())
        return set(trainer.progress_bar_metrics)

    assert bar(Logs) == {"epoch"}
    assert bar(ToyModule) == {"train_loss", "clients/val_loss", "clients/val_acc"}


def test_what_callbacks_add_is_logged(tmp_path):
    class Adds(FederatedCallback):
        def on_round_end(self, trainer: Any, round: int, metrics: dict[str, float]) -> None:
            metrics["added"] = 1.0

    logger = CSVLogger(tmp_path)
    callbacks = [Partition(2), ClientMetrics(), Adds()]
    FederatedTrainer(max_rounds=1, callbacks=callbacks, **{**QUIET, "logger": logger}).fit(Logs(), loader())
    assert {"added", "step/min"} <= columns(logger)


def test_what_one_client_logs_and_another_does_not_is_logged(tmp_path):
    class Differs(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("here", 1.0, logger=self.trainer.client_id == 0)
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path)
    trainer = FederatedTrainer(max_rounds=1, num_clients=2, engine=InProcess(), **{**QUIET, "logger": logger})
    trainer.fit(Differs(), loader())
    assert "here" in columns(logger)
