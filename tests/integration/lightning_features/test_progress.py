"""Progress bars and profilers show rounds."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import (
    RichProgressBar,
    TQDMProgressBar,
)

from lightning_fed.callbacks import (
    TQDMRoundBar,
)
from tests.integration.lightning_features.fits import federated, toy, train, val


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


def test_simple_profiler_times_rounds():
    trainer = federated(profiler="simple")
    trainer.fit(toy(), train(), val())
    assert len(trainer.profiler.recorded_durations["run_training_epoch"]) == 3
