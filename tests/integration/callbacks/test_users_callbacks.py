"""Callbacks that the user gives: called once a round at the server; those on batches and gradients are refused."""

from __future__ import annotations

import warnings
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger

from lightning_fed import ConfigurationError
from lightning_fed.callbacks import (
    History,
)
from lightning_fed.testing import ToyModule
from tests.integration.callbacks.runs import GRADIENT_HOOKS, federated, loader, toy

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


@pytest.mark.parametrize("hook", GRADIENT_HOOKS)
def test_a_callback_on_gradients_at_the_server_is_refused_with_the_way_out(hook):
    kind = type("Clips", (Callback,), {hook: lambda self, *args: None})
    with pytest.raises(
        ConfigurationError, match=rf"Clips writes {hook}, and gradients are the clients'.*client_callbacks=\[Clips"
    ):
        federated(kind())


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_a_callback_on_batches_at_the_server_is_named_before_the_first_round(hook):
    def stop(self: Any, *args: Any) -> None:
        raise LookupError("the first round")

    kind = type("Pictures", (Callback,), {hook: stop})
    said = pytest.warns(UserWarning, match=rf"Pictures writes {hook}: at the server .*client_callbacks=\[Pictures\(")
    with said, pytest.raises(LookupError):
        federated(kind()).fit(toy(), loader())


def test_nothing_is_said_of_callbacks_that_act_once_a_round(tmp_path):
    class Own(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None: ...
        def on_validation_batch_end(self, *args: Any) -> None: ...

    class Bar(L.pytorch.callbacks.TQDMProgressBar):
        def on_train_batch_end(self, *args: Any) -> None: ...

    class Checkpoint(ModelCheckpoint):
        def on_train_batch_end(self, *args: Any) -> None: ...

    callbacks = [Own(), Bar(), Checkpoint(tmp_path), LearningRateMonitor(), EarlyStopping("train_loss"), History()]
    options = {"enable_checkpointing": True, "enable_progress_bar": True, "logger": CSVLogger(tmp_path)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        federated(*callbacks, rounds=1, **options).fit(toy(), loader(), loader())
    assert not [str(one.message) for one in caught if "client_callbacks" in str(one.message)]


@pytest.mark.parametrize("given_by", ["callbacks", "configure_callbacks"])
def test_a_callback_that_answers_to_every_hook_has_written_none_and_is_called_at_the_server(given_by):
    double = Mock(spec=Callback)
    module = toy(*([double] if given_by == "configure_callbacks" else []))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        federated(*([double] if given_by == "callbacks" else []), rounds=3).fit(module, loader(), loader())
    assert [double.on_train_epoch_end.call_count, double.on_validation_epoch_end.call_count] == [3, 3]
    assert not [str(one.message) for one in caught if "Mock" in str(one.message)]


def test_a_client_callback_that_answers_to_every_hook_hears_of_each_step():
    heard: list[str] = []

    class Double(Mock):
        def __deepcopy__(self, memo: Any) -> Double:  # a client's copy tells, too
            return self

    double = Double(spec=Callback, state_dict=Callback().state_dict)
    double.on_before_backward.side_effect = lambda *args: heard.append("backward")
    double.on_train_batch_end.side_effect = lambda *args: heard.append("batch")
    federated(rounds=1, client_callbacks=[double], limit_train_batches=2).fit(toy(), loader())
    assert heard == ["backward", "batch"] * 4


@pytest.mark.parametrize(
    ("touch", "asked"),
    [
        (lambda batch: batch.image, "'image'"),
        (lambda batch: batch[0], r"\[0\]"),
        (lambda batch: batch["x"], r"\['x'\]"),
        (lambda batch: len(batch), "its length"),
        (lambda batch: next(iter(batch)), r"\[0\]"),
        (lambda batch: torch.cat(*batch), "its length"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*at the server that comes once a round")
def test_a_callback_that_takes_the_round_for_a_batch_is_told_so(touch, asked):
    class Touching(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            touch(batch)

    with pytest.raises(
        ConfigurationError, match=rf"a training batch is a federated round, .* asked it for {asked}.*client_callbacks="
    ):
        federated(Touching()).fit(toy(), loader())


@pytest.mark.filterwarnings("ignore:.*at the server that comes once a round")
def test_outputs_of_a_round_are_its_metrics():
    found = []

    class Reading(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            found.append((outputs["train_loss"], outputs.get("loss")))
            outputs["loss"]

    with pytest.raises(ConfigurationError, match=r"asked it for outputs\['loss'\]"):
        federated(Reading()).fit(toy(), loader())
    [(loss, missing)] = found
    assert loss > 0
    assert missing is None


@pytest.mark.filterwarnings("ignore:.*at the server that comes once a round")
def test_a_module_that_logs_loss_is_no_stumbling_block():
    class Loss(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    history = History()
    federated(history).fit(toy(cls=Loss), loader())
    assert len(history["loss"]) == 2


@pytest.mark.filterwarnings("ignore:.*at the server that comes once a round")
@pytest.mark.parametrize(
    "hook",
    ["on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"],
)
def test_a_callback_at_the_server_may_log_in_every_hook_of_training(hook, tmp_path):
    def log(self: Any, trainer: Any, *args: Any) -> None:
        self.log("mine", float(trainer.current_round), on_epoch=True)

    logger, history = CSVLogger(tmp_path), History()
    callback = type("Logs", (Callback,), {hook: log})()
    trainer = federated(callback, history, logger=logger)
    trainer.fit(toy(), loader(), loader())
    assert trainer.callback_metrics["mine"] == (1.0 if hook == "on_train_start" else 2.0)
    assert {"mine", "mine_epoch"} & set(logger.experiment.metrics_keys)
