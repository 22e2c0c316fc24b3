"""What a user reads speaks of rounds."""

from __future__ import annotations

import csv
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_module
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import PartialParticipation, Partition
from lightning_fed.testing import ToyModule, toy_data
from tests.helpers import QUIET


@pytest.fixture
def said() -> Any:
    """What Lightning logs."""
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler = Keep()
    rank_zero_module.log.addHandler(handler)
    yield records
    rank_zero_module.log.removeHandler(handler)


def fit(*callbacks: Any, val: bool = False, held_out: float = 0.25, **options: Any) -> FederatedTrainer:
    arguments = {"max_rounds": 2, **QUIET, **options}
    trainer = FederatedTrainer(callbacks=[Partition(4, val_fraction=held_out), *callbacks], **arguments)
    loaders = [DataLoader(toy_data(64), batch_size=8), DataLoader(toy_data(16), batch_size=8) if val else None]
    trainer.fit(ToyModule(), *loaders)
    return trainer


def test_the_end_of_a_run_is_its_last_round(said):
    fit()
    assert "`FederatedTrainer.fit` stopped: `max_rounds=2` reached." in said
    assert not [line for line in said if "epoch" in line.lower()]


def test_a_verbose_checkpoint_speaks_of_rounds(said, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="train_loss", verbose=True, save_top_k=-1)
    fit(checkpoint, enable_checkpointing=True)
    found = [line for line in said if "'train_loss' reached" in line]
    assert [line.split(":")[0] for line in found] == ["Round 1", "Round 2"]


def test_a_dev_run_speaks_of_rounds(said):
    fit(max_rounds=None, fast_dev_run=3)
    assert [line for line in said if "will run 3 round(s), of 2 clients with 3 batch(es) each" in line]


def test_lightning_speaks_of_epochs_again_afterwards(said):
    fit()
    plain = L.Trainer(max_epochs=1, **QUIET)
    plain.fit(ToyModule(), DataLoader(toy_data(64), batch_size=8))
    assert "`Trainer.fit` stopped: `max_epochs=1` reached." in said


def test_a_trainer_made_within_a_fit_takes_no_words_away(said):
    class Makes(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            FederatedTrainer(max_rounds=1, num_clients=1, **QUIET)

    fit(Makes())
    assert "`FederatedTrainer.fit` stopped: `max_rounds=2` reached." in said


@pytest.mark.parametrize("every", [50, 2, 1, None])
def test_every_round_is_logged_whatever_log_every_n_steps_says(every, tmp_path, said):
    logger = CSVLogger(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(logger=logger, max_rounds=3, log_every_n_steps=every)
    logged = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[1:]
    assert len(logged) == 3
    assert not [one for one in caught if "number of training batches" in str(one.message)]
    line = f"log_every_n_steps={every} counts a client's steps"
    assert bool([one for one in said if line in one]) is (every not in (1, None))


def test_log_every_n_steps_0_logs_nothing_of_training(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(logger=logger, val=True, log_every_n_steps=0)
    header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0]
    assert "val_loss" in header
    assert "train_loss" not in header


def test_log_every_n_steps_counts_batches_where_the_trainer_validates_or_tests(tmp_path):
    """As a plain Trainer does, before a fit and after it."""

    def steps(make: Any, fits: bool, name: str) -> list[int]:
        logger = CSVLogger(tmp_path, name)
        monitor = ThroughputMonitor(batch_size_fn=lambda batch: 8, window_size=100)
        trainer = make(log_every_n_steps=3, callbacks=[monitor], **{**QUIET, "logger": logger})
        if fits:
            trainer.fit(ToyModule(), batches)
        trainer.validate(ToyModule(), batches, verbose=False)
        logger.save()
        with Path(logger.log_dir, "metrics.csv").open() as file:
            return [int(row["step"]) for row in csv.DictReader(file) if row.get("validate/batches")]

    batches = DataLoader(toy_data(64), batch_size=8)
    expected = steps(partial(L.Trainer, max_epochs=1), False, "plain")
    assert expected == [3, 6]
    for fits in (False, True):
        assert steps(partial(FederatedTrainer, max_rounds=1, num_clients=1), fits, f"ours {fits}") == expected


@pytest.mark.parametrize("held_out", [0.25, 0.0])
def test_no_validation_loader_is_nothing_to_warn_of_where_clients_validate(held_out):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(held_out=held_out)
    assert bool([one for one in caught if "no `val_dataloader`" in str(one.message)]) is (held_out == 0)


@pytest.mark.parametrize(
    ("monitor", "fraction", "is_warned"),
    [("clients/val_loss", 0.5, True), ("clients/val_loss", 1.0, False), ("val_loss", 0.5, False)],
)
def test_a_monitor_over_clients_that_change_from_round_to_round_is_named(monitor, fraction, is_warned, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = [EarlyStopping(monitor), ModelCheckpoint(tmp_path, monitor=monitor)]
        fit(PartialParticipation(fraction_evaluate=fraction), *callbacks, val=True, enable_checkpointing=True)
    found = [str(one.message) for one in caught if "metric jumps" in str(one.message)]
    assert len(found) == is_warned
    if is_warned:
        assert "EarlyStopping(monitor='clients/val_loss') and ModelCheckpoint(monitor='clients/val_loss')" in found[0]
        assert "2 of 4 clients evaluate in a round" in found[0]
