"""Lightning's own features do per round what they do per epoch."""

from __future__ import annotations

import copy
import csv
import io
import pickle
import signal
import warnings
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
from torch.utils.data import DataLoader, IterableDataset

from lightning_fed import ClientError, ConfigurationError, FederatedTrainer
from lightning_fed.callbacks import (
    ClientData,
    FedAdam,
    FederatedCallback,
    History,
    Partition,
    TQDMRoundBar,
)
from lightning_fed.callbacks.base import CohortOwner
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


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
def test_progress_bars_show_rounds_and_metrics(capsys, monkeypatch, bar, text):
    monkeypatch.setenv("COLUMNS", "200")
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


def test_simple_profiler_times_rounds():
    trainer = federated(profiler="simple")
    trainer.fit(toy(), train(), val())
    assert len(trainer.profiler.recorded_durations["run_training_epoch"]) == 3


# --------------------------------------------------------------------------------------------- signals, exceptions


def at(hook: str, do: Callable[[], None], round: int = 2, client: int = 1) -> Callback:
    """A client callback that does something once, at a hook of one client in one round."""
    done = []

    def once(trainer: Any, module: Any) -> None:
        if not done and (trainer.current_round, trainer.client_id) == (round, client):
            done.append(True)
            do()

    return Each(hook, once)


def save_last(directory: Path) -> ModelCheckpoint:
    return ModelCheckpoint(directory, save_last=True)


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_end", "on_validation_start"])
def test_sigterm_while_a_client_works_ends_the_run_after_the_round_and_it_can_be_resumed(tmp_path, hook):
    options = {"rounds": 4, "held_out": True, "enable_checkpointing": True, "seed": 1}
    expected = toy()
    federated(**options).fit(expected, train(shuffle=True), val())

    before = signal.getsignal(signal.SIGTERM)
    trained = Each("on_train_end", lambda trainer, module: (trainer.current_round, trainer.client_id))
    stopped = federated(save_last(tmp_path), client_callbacks=[at(hook, terminate), trained], **options)
    with pytest.raises(SIGTERMException):
        stopped.fit(toy(), train(shuffle=True), val())
    assert signal.getsignal(signal.SIGTERM) is before
    assert trained.seen == [(1, 0), (1, 1), (2, 0), (2, 1)]

    module, trainer = toy(), federated(save_last(tmp_path), **options)
    trainer.fit(module, train(shuffle=True), val(), ckpt_path="last")
    assert same(weights(module), weights(expected))
    assert trainer.global_step == 4


def test_sigterm_while_a_client_opens_its_data_ends_the_run_after_the_round():
    class Stream(IterableDataset):
        def __iter__(self):  # Lightning reads the first batch of a stream before any training hook
            terminate()
            yield from toy_data(24)

    trained = Each("on_train_end", lambda trainer, module: (trainer.current_round, trainer.client_id))
    clients = [train(), DataLoader(Stream(), 8), train()]
    with pytest.raises(SIGTERMException):
        federated(ClientData(clients), client_callbacks=[trained]).fit(toy(), val_dataloaders=val())
    assert trained.seen == [(1, 0), (1, 1), (1, 2)]


def test_ctrl_c_while_a_client_works_is_that_of_a_plain_trainer():
    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    reasons, history = Each("on_exception", lambda trainer, module: None), History()
    reasons.on_exception = lambda trainer, module, exception: reasons.seen.append(exception)
    after = Each("on_train_epoch_end", lambda trainer, module: weights(module))
    module = toy()
    trainer = federated(reasons, after, history, client_callbacks=[at("on_train_batch_start", interrupt)])
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(module, train(), val())
    assert stopped.value.code == 1
    assert [type(reason) for reason in reasons.seen] == [KeyboardInterrupt]
    assert trainer.interrupted
    assert signal.getsignal(signal.SIGINT) is before
    assert len(after.seen) == 1
    assert same(weights(module), after.seen[0])
    assert type(module) is ToyModule


def test_a_module_that_exits_ends_the_run_with_its_own_exit_code():
    class Leaves(ToyModule):
        def training_step(self, batch, batch_idx):
            raise SystemExit(3)

    with pytest.raises(SystemExit) as stopped:
        federated().fit(toy(Leaves), train(), val())
    assert stopped.value.code == 3


class Broken(ToyModule):
    """Fails in training in round 2."""

    def training_step(self, batch, batch_idx):
        if self.trainer.current_round == 2 and self.trainer.client_id == 1:
            raise ValueError("broken")
        return super().training_step(batch, batch_idx)


def test_after_an_exception_the_module_is_the_users_with_the_weights_of_before_the_round():
    module = toy(Broken)
    after = Each("on_train_epoch_end", lambda trainer, module: weights(module))
    seen = []
    watcher = Callback()
    watcher.on_exception = lambda trainer, module, exception: seen.append(exception)
    with pytest.raises(ClientError, match="client 1 raised ValueError: broken") as raised:
        federated(after, watcher).fit(module, train(), val())
    assert seen == [raised.value]
    assert type(module) is Broken
    assert same(weights(module), after.seen[-1])
    assert not {name for name in module.__dict__ if "lightning_fed" in name}
    L.Trainer(**QUIET, max_epochs=1).validate(module, val(), verbose=False)


def test_what_a_servers_callback_raises_comes_out_as_it_is():
    class Watcher(FederatedCallback):
        def on_client_end(self, trainer, round, stage, report):
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        federated(Watcher()).fit(toy(), train())


# --------------------------------------------------------------------------------------------- validation


def test_check_val_every_n_epoch_validates_every_n_rounds_at_the_server_and_on_clients():
    history = History()
    federated(history, rounds=5, held_out=True, check_val_every_n_epoch=2).fit(toy(), train(), val())
    assert [row["round"] for row in history.rows if "val_loss" in row] == [2, 4]
    assert [row["round"] for row in history.rows if "clients/val_loss" in row] == [2, 4]
    assert len(history["train_loss"]) == 5


def test_sanity_validation_runs_before_the_first_round_at_the_server_only():
    batches = Each("on_validation_batch_start", lambda trainer, module: trainer.sanity_checking)
    on_clients = Each("on_validation_batch_start", lambda trainer, module: trainer.sanity_checking)
    history = History()
    trainer = federated(
        batches, history, num_sanity_val_steps=1, held_out=True, client_callbacks=[on_clients], rounds=1
    )
    trainer.fit(toy(), train(), val())
    assert batches.seen == [True, False, False]
    assert set(on_clients.seen) == {False}
    assert len(history.rows) == 1


def test_limit_val_batches_is_the_servers():
    batches = Each("on_validation_batch_start", lambda trainer, module: None)
    on_clients = Each("on_validation_batch_start", lambda trainer, module: None)
    clients = [(train(16), DataLoader(toy_data(24), 8)), (train(16), DataLoader(toy_data(24), 8))]
    options = {"limit_val_batches": 1, "client_callbacks": [on_clients], "rounds": 1}
    federated(batches, ClientData(clients), **options).fit(toy(), val_dataloaders=val())
    assert len(batches.seen) == 1
    assert len(on_clients.seen) == 2 * 3


class Whole(ToyModule):
    """Also tests and predicts."""

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(-1)


def test_validate_test_and_predict_work_before_and_after_fit_and_with_the_best_checkpoint(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")  # the first round's is the worst
    history = History()
    trainer = federated(checkpoint, history, rounds=4, enable_checkpointing=True)
    module = toy(Whole, lr=0.5)
    (untrained,) = trainer.validate(module, val(), verbose=False)
    assert len(trainer.predict(module, val())) == 2
    assert trainer.test(module, val(), verbose=False)[0]["test_loss"] == pytest.approx(untrained["val_loss"])

    trainer.fit(module, train(), val())
    worst = max(history["val_loss"])
    assert worst != history["val_loss"][-1]
    (last,) = trainer.validate(module, val(), verbose=False)
    assert last["val_loss"] == pytest.approx(history["val_loss"][-1])
    assert trainer.test(module, val(), verbose=False)[0]["test_loss"] == pytest.approx(history["val_loss"][-1])
    assert sum(len(batch) for batch in trainer.predict(module, val())) == 16
    (best,) = trainer.validate(module, val(), ckpt_path="best", verbose=False)
    assert best["val_loss"] == pytest.approx(worst)
    assert trainer.test(module, val(), ckpt_path="best", verbose=False)[0]["test_loss"] == pytest.approx(worst)
    assert len(trainer.predict(module, val(), ckpt_path="best")) == 2


def test_testing_the_best_checkpoint_leaves_the_history_of_the_run_alone(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max")
    history = History(per_client=True)
    trainer = federated(checkpoint, history, rounds=6, enable_checkpointing=True)
    module = toy(Scripted)
    trainer.fit(module, train(), val())
    before = copy.deepcopy((history.rows, history.clients))
    assert len(history.rows) == 6
    trainer.validate(module, val(), ckpt_path="best", verbose=False)  # round 3
    assert (history.rows, history.clients) == before


@pytest.mark.parametrize(("dev_run", "rounds"), [(2, 2), (True, 1)])
def test_fast_dev_run_runs_n_rounds_of_at_most_two_clients_with_n_batches_each(tmp_path, dev_run, rounds):
    trained = Each("on_train_batch_start", lambda trainer, module: (trainer.current_round, trainer.client_id))
    evaluated = Each("on_validation_batch_start", lambda trainer, module: (trainer.current_round, trainer.client_id))
    validated = Each("on_validation_batch_start", lambda trainer, module: trainer.current_round)
    trainer = FederatedTrainer(
        max_rounds=50,
        fast_dev_run=dev_run,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[
            Partition(4, val_fraction=0.5),
            validated,
            ModelCheckpoint(monitor="nobody"),
            EarlyStopping("nobody"),
        ],
        client_callbacks=[trained, evaluated],
        enable_progress_bar=False,
        local_epochs=3,
    )
    trainer.fit(toy(), train(256, batch_size=4), DataLoader(toy_data(64), 4))
    expected = [(r, c) for r in range(1, rounds + 1) for c in (0, 1) for _ in range(rounds)]
    assert trained.seen == expected
    assert evaluated.seen == expected
    assert validated.seen == [r for r in range(1, rounds + 1) for _ in range(rounds)]
    assert trainer.global_step == rounds
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dev_run", "told"), [(False, False), (0, False), (1, True), (True, True), (2, 2)])
def test_a_client_s_trainer_says_whether_it_is_a_dev_run_as_the_server_s_does(dev_run, told):
    trained = Each("on_train_batch_start", lambda trainer, module: trainer.fast_dev_run)
    evaluated = Each("on_validation_batch_start", lambda trainer, module: module.trainer.fast_dev_run)
    trainer = FederatedTrainer(
        max_rounds=1,
        fast_dev_run=dev_run,
        callbacks=[Partition(2, val_fraction=0.5)],
        client_callbacks=[trained, evaluated],
        **QUIET,
    )
    trainer.fit(toy(), train(64, batch_size=4))
    assert {*trained.seen} == {*evaluated.seen} == {told} == {trainer.fast_dev_run}


# --------------------------------------------------------------------------------------------- data


TRANSFERRED: list[tuple[str, Any]] = []  # what a client appends to a list of the datamodule's own is put back


class Data(L.LightningDataModule):
    """Notes what is called, and whose batches it transfers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append("setup " + stage)
        self.data = toy_data(32)

    def teardown(self, stage: str) -> None:
        self.calls.append("teardown " + stage)

    def train_dataloader(self) -> DataLoader:
        self.calls.append("train_dataloader")
        return DataLoader(self.data, 8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return val()

    test_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        TRANSFERRED.append(("before", getattr(self.trainer, "client_id", "server")))
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        TRANSFERRED.append(("after", getattr(self.trainer, "client_id", "server")))
        return [batch[0] * 0, batch[1]]


def test_a_datamodule_is_set_up_once_and_its_batch_hooks_act_on_clients_and_at_the_server():
    TRANSFERRED.clear()
    data = Data()
    inputs = Each("on_before_zero_grad", lambda trainer, module: module.seen)

    class Noting(ToyModule):
        def training_step(self, batch, batch_idx):
            self.seen = float(batch[0].abs().sum())
            return super().training_step(batch, batch_idx)

    trainer = federated(rounds=2, client_callbacks=[inputs])
    trainer.fit(toy(Noting), datamodule=data)
    assert data.calls == ["prepare_data", "setup fit", "train_dataloader", "teardown fit"]
    assert set(inputs.seen) == {0.0}
    # 2 rounds of 2 clients' 2 batches, then the server's 2 of validation.
    in_a_round = [(when, client) for client in (0, 1) for _ in range(2) for when in ("before", "after")]
    validating = [(when, "server") for _ in range(2) for when in ("before", "after")]
    assert (in_a_round + validating) * 2 == TRANSFERRED
    assert type(data) is Data

    trainer.test(toy(Whole), datamodule=data, verbose=False)
    assert data.calls[4:] == ["prepare_data", "setup test", "teardown test"]


def test_a_datamodule_given_first_is_one_too():
    history = History()
    federated(history).fit(toy(), Data())
    assert len(history["val_loss"]) == 3


def test_a_module_may_bring_its_own_loaders():
    class Complete(ToyModule):
        def train_dataloader(self):
            return train()

        def val_dataloader(self):
            return val()

    def fit(module: ToyModule, *loaders: DataLoader) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        history = History()
        federated(history, held_out=True).fit(module, *loaders)
        return weights(module), history.rows

    own, own_rows = fit(toy(Complete))
    given, given_rows = fit(toy(), train(), val())
    assert same(own, given)
    assert own_rows == given_rows


@pytest.mark.parametrize(("every", "opened"), [(0, 1), (1, 3), (2, 2)])
def test_reload_dataloaders_every_n_epochs_opens_the_loaders_anew(every, opened):
    class Opened(Data):
        def val_dataloader(self) -> DataLoader:
            self.calls.append("val_dataloader")
            return super().val_dataloader()

    data = Opened()
    federated(rounds=3, reload_dataloaders_every_n_epochs=every).fit(toy(), datamodule=data)
    assert data.calls.count("train_dataloader") == opened
    assert data.calls.count("val_dataloader") == opened


# --------------------------------------------------------------------------------------------- counters


def test_counters_mean_rounds_at_the_server_and_local_epochs_on_clients():
    def server(trainer: Any, module: Any) -> Any:
        return trainer.current_round, trainer.current_epoch, module.current_epoch, trainer.global_step

    def client(trainer: Any, module: Any) -> Any:
        return module.trainer.current_round, module.trainer.client_id, module.current_epoch

    at_start, at_end = Each("on_train_epoch_start", server), Each("on_validation_end", server)
    on_clients = Each("on_train_epoch_start", client)
    trainer = federated(at_start, at_end, rounds=2, local_epochs=2, client_callbacks=[on_clients])
    module = toy()
    trainer.fit(module, train(), val())
    assert at_start.seen == [(1, 0, 0, 0), (2, 1, 1, 1)]
    assert at_end.seen == [(1, 0, 0, 1), (2, 1, 1, 2)]
    assert on_clients.seen == [(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (2, 0, 2), (2, 0, 3), (2, 1, 2), (2, 1, 3)]
    assert (trainer.current_epoch, trainer.global_step) == (2, 2)


def test_a_client_evaluates_in_the_epoch_that_it_trained_last():
    epochs = Each("on_validation_epoch_start", lambda trainer, module: (trainer.current_round, module.current_epoch))
    federated(rounds=2, local_epochs=3, held_out=True, client_callbacks=[epochs]).fit(toy(), train())
    assert epochs.seen == [(1, 2), (1, 2), (2, 5), (2, 5)]


def test_a_checkpoint_saved_after_fit_knows_how_far_it_is(tmp_path):
    trainer = federated()
    trainer.fit(toy(), train(), val())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    checkpoint = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (3, 3)
    more = federated(rounds=5)
    more.fit(toy(), train(), val(), ckpt_path=tmp_path / "after.ckpt")
    assert (more.current_epoch, more.global_step) == (5, 5)


# --------------------------------------------------------------------------------------------- clients' trainers


def test_client_callbacks_are_copied_for_each_local_fit():
    class Counting(Callback):
        found: list[int] = []

        def __init__(self) -> None:
            self.batches = 0

        def on_train_batch_start(self, *args: Any) -> None:
            self.batches += 1

        def on_train_end(self, *args: Any) -> None:
            self.found.append(self.batches)

    mine = Counting()
    federated(rounds=2, client_callbacks=[mine]).fit(toy(), train())
    assert Counting.found == [2] * 4
    assert mine.batches == 0


def test_training_arguments_reach_the_clients_and_not_the_server():
    def arguments(trainer: Any, module: Any) -> Any:
        names = ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches", "limit_train_batches")
        return tuple(getattr(trainer, name) for name in names)

    on_clients, at_server = Each("on_train_start", arguments), Each("on_train_start", arguments)
    given = {
        "gradient_clip_val": 0.5,
        "gradient_clip_algorithm": "value",
        "accumulate_grad_batches": 2,
        "limit_train_batches": 1,
    }
    federated(at_server, client_callbacks=[on_clients], rounds=1, **given).fit(toy(), train())
    assert on_clients.seen == [(0.5, "value", 2, 1)] * 2
    assert at_server.seen == [(None, None, 1, 1.0)]


def test_clipping_accumulation_and_limits_do_on_a_client_what_they_do_in_a_plain_trainer():
    for given in (
        {"gradient_clip_val": 0.01},
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 2},
        {"overfit_batches": 1},
    ):
        options = {"limit_val_batches": 0, **given}
        module, expected = toy(), toy()
        clients = ClientData([train()])
        federated(clients, rounds=1, local_epochs=2, **options).fit(module)
        L.Trainer(max_epochs=2, **QUIET, **options).fit(expected, train())
        assert same(weights(module), weights(expected)), given
        assert not same(weights(module), weights(toy()))


@pytest.mark.parametrize("options", [{"overfit_batches": 2}, {"local_validation": True}])
@pytest.mark.parametrize("has_val", [False, True])
def test_a_local_fit_validates_only_if_it_is_to_and_can_and_nothing_is_said_of_lists(options, has_val):
    validated = Each("on_validation_batch_start", lambda trainer, module: trainer.client_id)
    clients = [DataLoader(toy_data(n), 8) for n in (16, 40, 24)]
    if has_val:
        clients[1] = (clients[1], DataLoader(toy_data(9, seed=1), 9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = FederatedTrainer(
            max_rounds=2, callbacks=[ClientData(clients)], client_callbacks=[validated], **QUIET, **options
        )
        trainer.fit(toy())
    assert not [one for one in caught if "Total length of `list`" in str(one.message)]
    in_fits = 2 if has_val and "local_validation" in options else 0
    assert validated.seen == [1] * (in_fits + 2 * has_val)  # and the clients' evaluation of each round


PRECISIONS = {
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "64-true": (torch.float64, torch.float64),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_holds_at_the_server_and_on_clients(precision):
    stored, computed = PRECISIONS[precision]
    found = []

    class Noting(ToyModule):
        def forward(self, x):
            logits = super().forward(x)
            found.append((logits.dtype, torch.get_default_dtype(), self.net[0].weight.dtype))
            return logits

    module, history = toy(Noting), History()
    start = weights(module)
    federated(history, precision=precision, held_out=True).fit(module, train(), val())
    default = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    # 3 rounds: 2 clients train 2 batches and evaluate 1, the server validates 2.
    assert found == [(computed, default, stored)] * 3 * (2 * (2 + 1) + 2)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {stored}
    assert torch.get_default_dtype() == torch.float32
    assert not torch.allclose(start["net.0.weight"].double(), module.net[0].weight.double())
    assert all(0 < loss < 1 for loss in history["clients/val_loss"] + history["val_loss"])


def test_detect_anomaly_and_deterministic_act_on_clients():
    found: list[tuple[bool, bool]] = []

    class Noting(ToyModule):
        def training_step(self, batch, batch_idx):
            found.append((torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled()))
            return super().training_step(batch, batch_idx)

    try:
        federated(rounds=1, detect_anomaly=True, deterministic=True).fit(toy(Noting), train())
        assert found == [(True, True)] * 4
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.is_anomaly_enabled()


# --------------------------------------------------------------------------------------------- the module is the user's


def test_the_module_is_the_users_during_and_after_fit():
    def copies(trainer: Any, module: Any) -> list[Any]:
        return [type(pickle.loads(pickle.dumps(module))), type(copy.deepcopy(module))]

    at_server, on_clients = Each("on_validation_start", copies), Each("on_train_batch_start", copies)
    module = toy(hidden=4)
    federated(at_server, rounds=1, client_callbacks=[on_clients]).fit(module, train(), val())
    assert at_server.seen == [[ToyModule, ToyModule]]
    assert on_clients.seen == [[ToyModule, ToyModule]] * 4
    assert type(module) is ToyModule
    assert not {name for name in module.__dict__ if "lightning_fed" in name}
    buffer = io.BytesIO()
    torch.save(module, buffer)
    assert same(weights(pickle.loads(pickle.dumps(module))), weights(module))


def test_a_second_fit_with_the_same_trainer_is_over_as_in_lightning_until_it_may_train_longer():
    history = History()
    trainer, module = federated(history, rounds=2), toy()
    trainer.fit(module, train(), val())
    done = weights(module)
    trainer.fit(module, train(), val())
    assert same(weights(module), done)
    assert len(history.rows) == 2

    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, train(), val())
    assert [row["round"] for row in history.rows] == [1, 2, 3, 4]
    assert trainer.global_step == 4
    four, expected = toy(), federated(rounds=4)
    expected.fit(four, train(), val())
    assert same(weights(module), weights(four))


def test_a_second_trainer_goes_on_from_the_weights_of_the_first():
    module = toy()
    federated(rounds=1).fit(module, train(), val())
    after = weights(module)
    start = Each("on_train_start", lambda trainer, module: weights(module))
    history = History()
    federated(start, history, rounds=2).fit(module, train(), val())
    assert same(start.seen[0], after)
    assert len(history.rows) == 2
    assert not same(weights(module), after)


def test_a_plain_trainer_trains_the_module_before_and_after():
    def plain(module: ToyModule) -> None:
        L.Trainer(**QUIET, max_epochs=1).fit(module, train(), val())

    module, copied = toy(), toy()
    plain(module)
    federated(rounds=1).fit(module, train(), val())
    copied.load_state_dict(module.state_dict())
    plain(module)
    plain(copied)
    assert same(weights(module), weights(copied))
    assert module.trainer.global_step == 4


# --------------------------------------------------------------------------------------------- client_state


class WithAdam(ToyModule):
    """Adam, and its learning rate as its metric."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def plain_adam(epochs: int, new_each_epoch: bool) -> dict[str, Tensor]:
    """Adam in a bare loop, over what client 0 trains on."""
    module = toy(WithAdam)
    for epoch in range(epochs):
        if epoch == 0 or new_each_epoch:
            optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for x, y in train():
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
    return weights(module)


def test_adams_moments_are_new_each_round_or_carried_on_with_the_client():
    for client_state, new_each_epoch in (("reset", True), ("carry", False)):
        module = toy(WithAdam)
        federated(ClientData([train()]), client_state=client_state).fit(module)
        expected = plain_adam(3, new_each_epoch)
        other = plain_adam(3, not new_each_epoch)
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
        assert not torch.allclose(module.net[0].weight, other["net.0.weight"], rtol=1e-3)


class Scheduled(ToyModule):
    """A tenth of the learning rate after each epoch (or batch)."""

    interval = "epoch"

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


class ScheduledByBatch(Scheduled):
    interval = "step"


class Alternating(CohortOwner):
    """Client 0 trains in round 1, client 1 in all others."""

    def sample(self, stage, round, num_clients, seed):
        return [min(round - 1, 1)]


def learning_rates(cls: type[ToyModule], *, rounds: int = 3, **options: Any) -> list[tuple[int, float]]:
    """(round, learning rate) at each batch: client 0's one in round 1, then client 1's two an epoch."""

    def now(trainer: Any, module: Any) -> Any:
        return trainer.current_round, round(trainer.optimizers[0].param_groups[0]["lr"], 12)

    seen = Each("on_train_batch_start", now)
    clients = ClientData([train(8), train(16)])
    federated(clients, Alternating(), rounds=rounds, client_callbacks=[seen], **options).fit(toy(cls))
    return seen.seen


def test_schedules_begin_anew_go_on_with_the_client_or_follow_the_global_round():
    anew = learning_rates(Scheduled, client_state="reset")
    assert anew == [(1, 1.0), (2, 1.0), (2, 1.0), (3, 1.0), (3, 1.0)]
    carried = learning_rates(Scheduled, client_state="carry")
    assert carried == [(1, 1.0), (2, 1.0), (2, 1.0), (3, 0.1), (3, 0.1)]
    by_round = learning_rates(Scheduled, client_state="global")
    assert by_round == [(1, 1.0), (2, 0.1), (2, 0.1), (3, 0.01), (3, 0.01)]


def test_schedules_follow_the_local_epochs_of_the_global_round():
    seen = learning_rates(Scheduled, client_state="global", local_epochs=2)
    round_1 = [(1, 1.0), (1, 0.1)]
    round_2 = [(2, 0.01), (2, 0.01), (2, 0.001), (2, 0.001)]
    assert seen == [*round_1, *round_2, (3, 1e-4), (3, 1e-4), (3, 1e-5), (3, 1e-5)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Client 1 has two batches an epoch: as if it had trained in all rounds before.
        ({}, [(1, 1.0), (2, 0.01), (2, 0.001), (3, 1e-4), (3, 1e-5)]),
        # One optimizer step an epoch.
        ({"accumulate_grad_batches": 2}, [(1, 1.0), (2, 0.1), (2, 0.1), (3, 0.01), (3, 0.01)]),
        ({"limit_train_batches": 1}, [(1, 1.0), (2, 0.1), (3, 0.01)]),
        ({"local_steps": 1}, [(1, 1.0), (2, 0.1), (3, 0.01)]),
        ({"local_steps": 3}, [(1, 1.0), (1, 0.1), (1, 0.01), (2, 1e-3), (2, 1e-4), (2, 1e-5)]),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
@pytest.mark.filterwarnings("error:Detected call of `lr_scheduler.step")
def test_schedules_by_step_follow_the_steps_of_all_rounds_before(options, expected):
    rounds = expected[-1][0]
    assert learning_rates(ScheduledByBatch, rounds=rounds, client_state="global", **options) == expected


def test_a_schedule_by_step_has_no_global_round_where_nobody_knows_an_epoch_s_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(toy_data(16))

    clients = ClientData([DataLoader(Stream(), batch_size=8)])
    with pytest.raises(ClientError, match=r"client 0 .*on a loader without length.*local_steps=.*client_state='carry'"):
        federated(clients, rounds=2, client_state="global").fit(toy(ScheduledByBatch))


class Cosine(ToyModule):
    """Anneals over all epochs, the usual way."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)]


class OneCycle(ToyModule):
    """One cycle over all steps, the usual way."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def rates_of_a_plain_trainer(cls: type[ToyModule], epochs: int) -> list[float]:
    seen = Each("on_train_batch_start", lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])
    L.Trainer(max_epochs=epochs, callbacks=[seen], **{**QUIET, "limit_val_batches": 0}).fit(toy(cls), train(16))
    return seen.seen


def rates_of_a_client(cls: type[ToyModule], rounds: int, **options: Any) -> list[float]:
    seen = Each("on_train_batch_start", lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])
    federated(ClientData([train(16)]), rounds=rounds, client_callbacks=[seen], **options).fit(toy(cls))
    return seen.seen


@pytest.mark.parametrize("client_state", ["global", "carry"])
@pytest.mark.parametrize("cls", [Cosine, OneCycle])
def test_schedules_over_the_whole_run_are_those_of_a_plain_trainer(cls, client_state):
    expected = rates_of_a_plain_trainer(cls, epochs=6)
    assert rates_of_a_client(cls, 6, client_state=client_state) == pytest.approx(expected)
    assert rates_of_a_client(cls, 3, client_state=client_state, local_epochs=2) == pytest.approx(expected)


def test_a_schedule_that_begins_anew_is_the_same_in_each_round():
    expected = rates_of_a_plain_trainer(OneCycle, epochs=2)
    assert rates_of_a_client(OneCycle, 3, client_state="reset", local_epochs=2) == pytest.approx(expected * 3)
    rates = rates_of_a_client(Cosine, 3, client_state="reset", local_epochs=2)
    assert rates[:4] == rates[4:8] == rates[8:]


def test_epochs_count_up_to_max_epochs_over_the_whole_run():
    parts = Each("on_train_epoch_end", lambda trainer, module: (module.current_epoch + 1, trainer.max_epochs))
    federated(ClientData([train(16)]), rounds=3, local_epochs=2, client_callbacks=[parts]).fit(toy())
    assert parts.seen == [(epoch, 6) for epoch in range(1, 7)]


class Plateau(ToyModule):
    """Its validation loss never gets better; a scheduler watches it."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def test_reduce_on_plateau_watches_the_clients_own_validation():
    seen = Each("on_train_epoch_start", lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])
    options = {"rounds": 1, "local_epochs": 3, "held_out": True, "client_callbacks": [seen]}
    federated(local_validation=True, **options).fit(toy(Plateau), train(), val())
    assert seen.seen == pytest.approx([1.0, 1.0, 0.1] * 2)


def test_reduce_on_plateau_without_local_validation_says_what_to_write():
    with pytest.raises(ConfigurationError, match=r"ReduceLROnPlateau that monitors 'val_loss'.*local_validation=True"):
        federated(held_out=True, client_state="carry").fit(toy(Plateau), train(), val())


def test_the_servers_optimizer_starts_anew_in_a_second_fit():
    def fit(trainer: FederatedTrainer) -> dict[str, Tensor]:
        module = toy()
        trainer.fit(module, train())
        return weights(module)

    method = FedAdam()
    assert same(fit(federated(method)), fit(federated(method)))
