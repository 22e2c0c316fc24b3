"""Validation within a fit, and validate, test and predict beside it."""

from __future__ import annotations

import copy

import pytest
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from torch.utils.data import DataLoader

from lightning_fed.callbacks import (
    ClientData,
    History,
)
from lightning_fed.testing import toy_data
from tests.integration.lightning_features.fits import Each, Scripted, Whole, federated, toy, train, val


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
