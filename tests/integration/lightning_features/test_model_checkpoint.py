"""ModelCheckpoint saves rounds as it saves epochs."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)

from lightning_fed.testing import ToyModule
from tests.integration.lightning_features.fits import Each, Scripted, federated, same, toy, train, val, weights


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
