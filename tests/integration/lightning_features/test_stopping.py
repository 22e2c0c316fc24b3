"""EarlyStopping, Timer and max_time count rounds."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import (
    EarlyStopping,
    Timer,
)

from lightning_fed.callbacks import (
    History,
)
from tests.integration.lightning_features.fits import Scripted, federated, toy, train, val


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


def test_timer_measures_rounds_and_stops_after_one():
    timer, history = Timer({"milliseconds": 1}), History()
    federated(timer, history, rounds=5).fit(toy(), train(), val())
    assert len(history.rows) == 1
    assert timer.time_elapsed("train") > timer.time_elapsed("validate") > 0


def test_max_time_ends_a_run_without_max_rounds():
    history = History()
    federated(history, rounds=None, max_time={"milliseconds": 1}).fit(toy(), train(), val())
    assert [row["round"] for row in history.rows] == [1]
