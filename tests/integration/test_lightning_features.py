"""Lightning's own features do per round what they do per epoch."""

from __future__ import annotations

import copy
import csv
import io
import pickle
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fed import ClientError, FederatedTrainer
from lightning_fed.callbacks import (
    ClientData,
    FedAdam,
    FederatedCallback,
    History,
    PartialParticipation,
    Partition,
    TQDMRoundBar,
)
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # toys are too small for more
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(examples: int = 32, **options: Any) -> DataLoader:
    return DataLoader(toy_data(examples), **{"batch_size": 8, **options})


def val() -> DataLoader:
    return DataLoader(toy_data(16, seed=1), 8)


def toy(cls: type[ToyModule] = ToyModule, **hparams: Any) -> Any:
    torch.manual_seed(0)
    return cls(**hparams)


def federated(*callbacks: Callback, rounds: int | None = 3, held_out: bool = False, **options: Any) -> FederatedTrainer:
    """Two clients, no output."""
    clients = [] if any("partition" in getattr(c, "decides", ()) for c in callbacks) else [
        Partition(2, val_fraction=0.25 if held_out else 0.0)
    ]  # fmt: skip
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
        self.log("val_acc", SCRIPT[self.trainer.current_round - 1])
        self.log("val_loss", SCRIPT[self.trainer.current_round - 1])


# --------------------------------------------------------------------------------------------- checkpoints, stopping


def test_model_checkpoint_keeps_the_best_two_rounds(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_top_k=2)
    after = Each("on_validation_end", lambda trainer, module: weights(module))
    trainer = federated(after, checkpoint, rounds=6, enable_checkpointing=True)
    trainer.fit(toy(Scripted, hidden=4, lr=0.2), train(), val())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=2-step=3.ckpt", "epoch=4-step=5.ckpt"]
    assert Path(checkpoint.best_model_path).name == "epoch=2-step=3.ckpt"
    assert float(checkpoint.best_model_score) == pytest.approx(0.9)

    best = Scripted.load_from_checkpoint(checkpoint.best_model_path)
    assert type(best) is Scripted
    assert dict(best.hparams) == {"hidden": 4, "lr": 0.2}
    assert same(weights(best), after.seen[2])
    assert not same(weights(best), after.seen[5])


def test_a_default_trainer_saves_the_last_round_below_default_root_dir(tmp_path):
    trainer = federated(rounds=2, enable_checkpointing=True, logger=True, default_root_dir=tmp_path / "root")
    trainer.fit(toy(), train(), val())
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["lightning_logs"]
    # One version: clients' trainers have neither loggers nor checkpoints.
    assert [path.name for path in (tmp_path / "root" / "lightning_logs").iterdir()] == ["version_0"]
    found = [str(path.relative_to(tmp_path / "root")) for path in tmp_path.rglob("*.ckpt")]
    assert found == ["lightning_logs/version_0/checkpoints/epoch=1-step=2.ckpt"]


def test_checkpoints_that_the_module_configures_are_the_servers(tmp_path):
    class Configured(ToyModule):
        def configure_callbacks(self):
            return [ModelCheckpoint(tmp_path, save_top_k=-1)]

    federated(rounds=2, enable_checkpointing=True).fit(toy(Configured), train(), val())
    assert sorted(path.name for path in tmp_path.rglob("*.ckpt")) == ["epoch=0-step=1.ckpt", "epoch=1-step=2.ckpt"]


@pytest.mark.parametrize("monitor", ["val_loss", "clients/val_loss", "scripted_train"])
def test_early_stopping_counts_rounds(monitor):
    # 0.5, 0.1, then two rounds that are no better.
    stopping, history = EarlyStopping(monitor, patience=2), History()
    trainer = federated(stopping, history, rounds=6, held_out=True)
    trainer.fit(toy(Scripted), train(), val())
    assert stopping.stopped_epoch == 3
    assert history[monitor] == pytest.approx([0.5, 0.1, 0.9, 0.7])
    assert (trainer.current_epoch, trainer.global_step) == (4, 4)


def test_early_stopping_on_a_name_that_nobody_logs_says_which_there_are():
    with pytest.raises(RuntimeError, match=r"`nobody` which is not available.*`train_loss`, `clients/val_loss`"):
        federated(EarlyStopping("nobody"), held_out=True).fit(toy(), train(), val())


# --------------------------------------------------------------------------------------------- loggers


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


def test_learning_rate_monitor_works_at_the_server(tmp_path):
    logger = CSVLogger(tmp_path)
    federated(LearningRateMonitor(), logger=logger).fit(toy(), train(), val())
    assert [row["lr-ServerOptimizer"] for row in rows_of(logger) if "lr-ServerOptimizer" in row] == ["1.0"] * 3


# --------------------------------------------------------------------------------------------- bars, time, profiler


@pytest.mark.parametrize(
    ("bar", "text"),
    [
        (None, "Round 2/2"),
        (RichProgressBar, "Epoch 1/1"),
        (TQDMProgressBar, "Epoch 1: 100%"),
        (TQDMRoundBar, "Round 2/2"),
    ],
)
def test_progress_bars_show_rounds_and_metrics(capsys, bar, text):
    callbacks = [] if bar is None else [bar()]
    trainer = federated(*callbacks, rounds=2, held_out=True, enable_progress_bar=True)
    module = toy()
    trainer.fit(module, train(), val())
    trainer.validate(module, val())
    shown = "".join(capsys.readouterr())
    assert text in shown
    assert "train_loss" in shown
    assert "clients/val_loss" in shown
    assert "Validat" in shown


def test_enable_progress_bar_false_shows_nothing(capsys):
    federated(rounds=1).fit(toy(), train(), val())
    assert "Round" not in capsys.readouterr().out


def test_timer_measures_rounds_and_stops_after_one():
    timer, history = Timer({"milliseconds": 1}), History()
    federated(timer, history, rounds=5).fit(toy(), train(), val())
    assert len(history.rows) == 1
    assert timer.time_elapsed("train") > timer.time_elapsed("validate") > 0


def test_max_time_ends_a_run_without_max_rounds():
    history = History()
    federated(history, rounds=None, max_time={"milliseconds": 1}).fit(toy(), train(), val())
    assert [row["round"] for row in history.rows] == [1]


def test_simple_profiler_times_rounds(capsys):
    trainer = federated(profiler="simple")
    trainer.fit(toy(), train(), val())
    assert len(trainer.profiler.recorded_durations["run_training_epoch"]) == 3
    assert any(action.endswith("ServerView.on_train_batch_start") for action in trainer.profiler.recorded_durations) or (
        "[LightningModule]ToyModule.on_train_batch_start" in trainer.profiler.recorded_durations
    )
