"""Loggers have one set of rows a round; what modules write to them is heard at the server."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import (
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from lightning_fed.callbacks import (
    History,
)
from lightning_fed.testing import ToyModule
from tests.integration.lightning_features.fits import Each, federated, toy, train, val


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_csv_logger_has_one_set_of_rows_a_round(tmp_path):
    logger, history = CSVLogger(tmp_path), History()
    federated(history, logger=logger, held_out=True).fit(toy(), train(), val())
    rows = rows_of(logger)
    at_clients = {"train_loss", "clients/val_loss", "clients/val_acc", "step", "epoch"}
    at_server = {"val_loss", "val_acc", "step", "epoch"}
    assert [set(row) for row in rows] == [at_clients, at_server] * 3
    assert [(row["step"], row["epoch"]) for row in rows] == [(str(r), str(r)) for r in (0, 0, 1, 1, 2, 2)]
    for name in ("train_loss", "clients/val_acc", "val_loss"):
        assert [float(row[name]) for row in rows if name in row] == pytest.approx(history[name], rel=1e-5)


def test_without_a_logger_nothing_is_said_of_loggers():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        federated(logger=False, held_out=True).fit(toy(), train(), val())
    assert not [one for one in caught if "have no logger configured" in str(one.message)]


def test_csv_logger_goes_on_counting_in_a_resumed_run(tmp_path):
    def fit(rounds: int, ckpt_path: str | None) -> list[dict[str, str]]:
        logger = CSVLogger(tmp_path, version=rounds)
        saving = ModelCheckpoint(tmp_path, save_last=True)
        trainer = federated(saving, rounds=rounds, logger=logger, enable_checkpointing=True)
        trainer.fit(toy(), train(), val(), ckpt_path=ckpt_path)
        return rows_of(logger)

    assert [row["step"] for row in fit(2, None)] == ["0", "0", "1", "1"]
    assert [(row["step"], row["epoch"]) for row in fit(4, "last")] == [("2", "2"), ("2", "2"), ("3", "3"), ("3", "3")]


def test_tensorboard_logger_has_one_point_a_round(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger, history = TensorBoardLogger(tmp_path), History()
    federated(history, logger=logger, held_out=True).fit(toy(hidden=4), train(), val())
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    names = {"train_loss", "clients/val_loss", "clients/val_acc", "val_loss", "val_acc", "epoch"}
    assert names <= set(events.Tags()["scalars"])
    for name in names - {"epoch"}:
        points = events.Scalars(name)
        assert [point.step for point in points] == [0, 1, 2]
        assert [point.value for point in points] == pytest.approx(history[name], rel=1e-6)
    assert "hidden: 4" in (Path(logger.log_dir) / "hparams.yaml").read_text()


class Chatty(ToyModule):
    """Uses its logger the way people do."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        self.logger.experiment.add_scalar("mine/train", 1.0, self.global_step)
        self.logger.experiment.add_histogram("mine/weights", self.net[0].weight, self.global_step)
        self.logger.log_metrics({"mine/metrics": 1.0}, step=self.global_step)
        self.logger.log_hyperparams({"a": 1})
        assert len(self.loggers) == 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.logger.experiment.add_scalar("mine/val", 1.0, self.current_epoch)
        super().validation_step(batch, batch_idx)


def test_a_module_that_writes_to_its_logger_is_heard_at_the_server_and_harmless_on_clients(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    federated(logger=logger, held_out=True, rounds=2).fit(toy(Chatty), train(), val())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert {name for name in events.Tags()["scalars"] if name.startswith("mine/")} == {"mine/val"}
    assert [point.step for point in events.Scalars("mine/val")] == [0, 0, 1, 1]


@pytest.mark.parametrize("options", [{}, {"log_momentum": True, "log_weight_decay": True}], ids=["lr", "all"])
@pytest.mark.filterwarnings("ignore:You have set log_momentum=True")
def test_learning_rate_monitor_works_at_the_server_and_on_clients(tmp_path, options):
    logger = CSVLogger(tmp_path)
    of_clients = Each("on_train_end", lambda trainer, module: dict(trainer.callbacks[-2].lrs))
    trainer = federated(
        LearningRateMonitor(**options),
        logger=logger,
        client_callbacks=[LearningRateMonitor(**options), of_clients],
    )
    trainer.fit(toy(lr=0.125), train(), val())
    logged = [row["step"] for row in rows_of(logger) if any(name.startswith("lr-") for name in row)]
    assert sorted(set(logged)) == ["0", "1", "2"]
    assert [set(lrs["lr-SGD"]) for lrs in of_clients.seen] == [{0.125}] * 6  # 2 clients, 3 rounds
