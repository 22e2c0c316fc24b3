"""ModelCheckpoint and EarlyStopping act when a round is over, also where the clients alone validate."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import FedAdam, History, PartialParticipation, Partition
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET, sweep


def loader(examples: int = 48, **options: Any) -> DataLoader[Any]:
    return DataLoader(toy_data(examples), batch_size=8, **options)


def federated(*callbacks: Any, rounds: int = 6, **options: Any) -> FederatedTrainer:
    return FederatedTrainer(
        max_rounds=rounds,
        callbacks=[Partition(2, val_fraction=0.25), *callbacks],
        **{**QUIET, "enable_checkpointing": True, **options},
    )


class ByRound(ToyModule):
    """Its validation metrics are the round's number."""

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log_dict({"val_loss": float(self.trainer.current_round), "val_acc": -float(self.trainer.current_round)})


def rounds_saved(folder: Path) -> list[int]:
    """The rounds whose weights were saved: as many steps as rounds."""
    return sorted(torch.load(file, weights_only=True)["global_step"] for file in folder.glob("*.ckpt"))


# ------------------------------------------------------------------------------------------- by steps and by time


@pytest.mark.parametrize("validates", sweep([True, False], [True]))
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"every_n_train_steps": 2}, [2, 4, 6]),
        ({"train_time_interval": timedelta(microseconds=1)}, [1, 2, 3, 4, 5, 6]),
        ({"train_time_interval": timedelta(days=1)}, []),
    ],
)
def test_model_checkpoint_by_steps_or_time_saves_rounds_without_a_false_warning(tmp_path, how, expected, validates):
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, **how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        federated(checkpoint).fit(ByRound(), loader(), loader(8) if validates else None)
    assert rounds_saved(tmp_path) == expected
    assert not [one for one in caught if "manual optimization" in str(one.message)]
    assert type(checkpoint) is ModelCheckpoint


@pytest.mark.parametrize("how", [{"every_n_train_steps": 1}, {"train_time_interval": timedelta(microseconds=1)}, {}])
@pytest.mark.parametrize(
    ("monitor", "every"),
    sweep(itertools.product(["val_loss", "clients/val_loss"], [1, 2]), [("clients/val_loss", 2)]),
)
def test_model_checkpoint_monitors_the_round_that_it_saves(tmp_path, how, monitor, every):
    name = "{step}-{" + monitor + "}"
    checkpoint = ModelCheckpoint(tmp_path, name, monitor, save_top_k=-1, auto_insert_metric_name=False, **how)
    federated(checkpoint, check_val_every_n_epoch=every).fit(ByRound(), loader(), loader(8))
    saved = {step: float(score) for step, score in checkpoint.best_k_models.items()}
    for path, score in saved.items():
        step = torch.load(path, weights_only=True)["global_step"]
        assert score == step // every * every  # that of this round, or of the last one that was validated
    rounds = [6 // 2, 6][every == 1] if not how else 7 - every
    assert len(saved) == rounds


def run(folder: Path, how: dict[str, Any], ckpt_path: Path | None = None, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module, history = ToyModule(), History()
    callbacks = [history, FedAdam(), ModelCheckpoint(folder, save_top_k=-1, **how)]
    trainer = federated(*callbacks, rounds=3, **options)
    trainer.fit(module, loader(shuffle=True), loader(8), ckpt_path=ckpt_path)
    return module, history


@pytest.mark.parametrize(
    "how",
    sweep(
        [{"every_n_train_steps": 1}, {"train_time_interval": timedelta(microseconds=1)}], [{"every_n_train_steps": 1}]
    ),
)
def test_a_run_resumed_from_a_checkpoint_by_steps_or_time_lacks_no_validation(tmp_path, how):
    expected, history = run(tmp_path / "whole", how)
    for checkpoint in (tmp_path / "whole").glob("*.ckpt"):
        module, resumed = run(tmp_path / "resumed", how, checkpoint)
        torch.testing.assert_close(dict(module.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
        assert resumed.rows == history.rows


# ------------------------------------------------------------------------------------------- clients validate alone


@pytest.mark.parametrize(
    ("every", "validated"), sweep([(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (3, [3, 6])], [(2, [2, 4, 6])])
)
@pytest.mark.parametrize("monitor", ["clients/val_loss", None])
def test_model_checkpoint_saves_where_the_clients_alone_validate(tmp_path, every, validated, monitor):
    checkpoint = ModelCheckpoint(tmp_path, monitor=monitor, save_top_k=-1)
    federated(checkpoint, check_val_every_n_epoch=every).fit(ByRound(), loader())
    assert rounds_saved(tmp_path) == validated
    if monitor:
        assert float(checkpoint.best_model_score) == validated[0]


@pytest.mark.parametrize(("every", "stopped"), sweep([(1, 3), (2, 6), (3, 9)], [(2, 6)]))
@pytest.mark.parametrize("explicit", [None, False])
def test_early_stopping_checks_where_the_clients_alone_validate(every, stopped, explicit):
    # Round 1 is the best: with a patience of two validations the third is the last.
    stopping = EarlyStopping("clients/val_loss", patience=2, check_on_train_epoch_end=explicit)
    trainer = federated(stopping, rounds=12, check_val_every_n_epoch=every)
    trainer.fit(ByRound(), loader())
    assert trainer.current_epoch == stopped
    assert type(stopping) is EarlyStopping


class Reports(Callback):
    """As Ray Tune's: it has every hook, and acts at one. ``Optuna``'s has that one alone."""

    __module__ = "ray.tune.integration.pytorch_lightning"

    def __init__(self) -> None:
        self.rounds: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            score = trainer.callback_metrics.get("val_loss", trainer.callback_metrics["clients/val_loss"])
            self.rounds.append((pl_module.current_epoch, float(score)))


def _at_no_hook(self: Any, *args: Any, **kwargs: Any) -> None: ...


_at_no_hook.__module__ = Reports.__module__
for _hook in ("on_train_batch_start", "on_train_batch_end", "on_after_backward", "on_before_optimizer_step"):
    setattr(Reports, _hook, _at_no_hook)
TuneCallback = type("TuneCallback", (Reports,), {"__module__": Reports.__module__})
Pruning = type("PyTorchLightningPruningCallback", (Reports,), {"__module__": "optuna_integration.any", "monitor": "x"})


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("kind", [type("Own", (TuneCallback,), {}), Pruning])
def test_callbacks_of_optuna_and_ray_tune_look_at_a_round_when_it_has_been_validated(kind, validates, every):
    callback = kind()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = federated(callback, check_val_every_n_epoch=every)
        trainer.fit(ByRound(), loader(), loader(8) if validates else None)
    assert callback.rounds == [(round - 1, round) for round in range(every, 7, every)]
    assert type(callback) is kind
    assert not [one for one in caught if "client_callbacks" in str(one.message)]


def test_optuna_s_monitor_of_clients_that_change_is_named():
    callback = Pruning()
    callback.monitor = "clients/val_loss"
    with pytest.warns(UserWarning, match=r"PyTorchLightningPruningCallback\(monitor='clients/val_loss'\): 1 of 2"):
        federated(callback, PartialParticipation(fraction_evaluate=0.5), rounds=1).fit(ByRound(), loader())


@pytest.mark.parametrize("every", [1, 3])
def test_limit_val_batches_0_is_no_validation_at_the_server(every):
    stopping = EarlyStopping("clients/val_loss", patience=1)
    trainer = federated(stopping, rounds=12, check_val_every_n_epoch=every, limit_val_batches=0)
    trainer.fit(ByRound(), loader(), loader(8))
    assert trainer.current_epoch == 2 * every


@pytest.mark.parametrize(("every", "stopped"), sweep([(1, 3), (3, 9)], [(1, 3)]))
@pytest.mark.parametrize("monitor", ["val_loss", "clients/val_loss", "train_loss"])
def test_early_stopping_beside_a_validation_at_the_server_checks_once_each_time(every, stopped, monitor):
    class Flat(ByRound):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * 0 + 1.0

        def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            super().log(name, 1.0 if name == "train_loss" else value, *args, **kwargs)

    stopping = EarlyStopping(monitor, patience=2)
    trainer = federated(stopping, rounds=12, check_val_every_n_epoch=every)
    trainer.fit(Flat(), loader(), loader(8))
    assert (trainer.current_epoch, stopping.wait_count) == (stopped, 2)


# -------------------------------------------------------------------------- names that not every round has


class SomeRounds(ToyModule):
    """Clients log some names in round 1 alone, and so does the server."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        if self.trainer.current_round == 1:
            self.log_dict({"early": 1.0, "both": 2.0}, on_step=False, on_epoch=True, prog_bar=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.trainer.current_round == 1:
            self.log("early_val", 3.0)
            if not hasattr(self.trainer, "client_id"):
                self.log("both", 3.0)


class Kept(Callback):
    """What the trainer has at the end of each round."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, set[str]]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kinds = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
        self.rounds.append({kind: set(getattr(trainer, kind)) for kind in kinds})


def test_a_name_that_clients_logged_in_an_earlier_round_is_gone():
    kept = Kept()
    federated(kept, rounds=2, enable_checkpointing=False).fit(SomeRounds(), loader(), loader(8))
    first, second = (each["callback_metrics"] for each in kept.rounds)
    assert {"early", "both", "early_val", "clients/early_val"} <= first
    assert first - second == {"early", "clients/early_val"}
    assert not any("early" in names for names in kept.rounds[1].values())


@pytest.mark.parametrize("validates", [True, False])
def test_clients_evaluation_is_kept_for_rounds_without_one_as_lightning_keeps_its_own(validates):
    kept = Kept()
    data = loader(8) if validates else None
    federated(kept, rounds=4, enable_checkpointing=False, check_val_every_n_epoch=3).fit(ToyModule(), loader(), data)
    has = ["clients/val_loss" in each["callback_metrics"] for each in kept.rounds]
    assert has == [False, False, True, True]


def test_prog_bar_or_logger_in_some_rounds_only_ends_no_run():
    class Sometimes(ToyModule):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            first = self.trainer.current_round == 1
            self.log("sometimes", 1.0, on_step=False, on_epoch=True, prog_bar=first, logger=not first)
            return super().training_step(batch, batch_idx)

    trainer = federated(rounds=3, enable_checkpointing=False)
    trainer.fit(Sometimes(), loader(), loader(8))
    assert trainer.current_epoch == 3


def test_a_monitor_of_a_name_that_the_round_has_not_says_so(tmp_path):
    stops = EarlyStopping("early", check_on_train_epoch_end=True)
    with pytest.raises(RuntimeError, match="Early stopping conditioned on metric `early` which is not available"):
        federated(stops, enable_checkpointing=False).fit(SomeRounds(), loader(), loader(8))
    saves = ModelCheckpoint(tmp_path, "{step}", "early", save_top_k=-1, save_on_train_epoch_end=True)
    with pytest.raises(MisconfigurationException, match="could not find the monitored key"):
        federated(saves).fit(SomeRounds(), loader(), loader(8))
    assert rounds_saved(tmp_path) == [1]
