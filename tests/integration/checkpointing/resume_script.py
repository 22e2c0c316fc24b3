"""A federated run that can be stopped at any moment; as a script it kills itself with SIGKILL in round 4.

``python resume_script.py DIRECTORY`` trains in DIRECTORY until client 2 or a later one is done in round 4.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_fed import FederatedTrainer
from lightning_fed.callbacks import FedAdam, FederatedCallback, History, PartialParticipation, Partition
from lightning_fed.testing import ToyModule, toy_data

ROUNDS, STOP_ROUND = 6, 4


class StatefulToy(ToyModule):
    """All that a restart could lose: BatchNorm's buffers, Dropout's draws, Adam's moments, a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.9)}


class StopAt(FederatedCallback):
    """Calls ``stop`` at one moment of round 4."""

    MOMENTS = (
        "round start",
        "client trained",
        "client evaluated",
        "weights taken over",
        "validation begins",
        "validation batch",
        "round done, not saved",
    )

    def __init__(self, moment: str, stop: Callable[[], None]) -> None:
        assert moment in self.MOMENTS
        self.moment, self.stop = moment, stop

    def _at(self, moment: str, round: int) -> None:
        if moment == self.moment and round == STOP_ROUND:
            self.stop()

    def on_round_start(self, trainer, round, stage, cohort):
        if stage == "train":
            self._at("round start", round)

    def on_client_end(self, trainer, round, stage, report):
        if stage == "evaluate" or report.client >= 2:
            self._at("client trained" if stage == "train" else "client evaluated", round)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._at("weights taken over", trainer.current_round)

    def on_validation_start(self, trainer, pl_module):
        self._at("validation begins", trainer.current_round)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._at("validation batch", trainer.current_round)

    def on_train_epoch_end(self, trainer, pl_module):
        self._at("round done, not saved", trainer.current_round)


def run(
    directory: Path,
    *callbacks: Callback,
    checkpoint: dict[str, Any] | None = None,
    ckpt_path: str | Path | None = None,
    rounds: int = ROUNDS,
    **options: Any,
) -> tuple[StatefulToy, History, FederatedTrainer]:
    """FedAdam over 3 of 4 clients a round, which keep their Adam from round to round; saves in ``directory``."""
    torch.manual_seed(7)
    module, history = StatefulToy(), History(per_client=True)
    saving = {"monitor": "val_loss", "save_top_k": -1, "save_last": True, **(checkpoint or {})}
    trainer = FederatedTrainer(
        max_rounds=rounds,
        client_state="carry",
        callbacks=[
            Partition(4, val_fraction=0.25),
            PartialParticipation(fraction_train=0.75, fraction_evaluate=0.5),
            FedAdam(learning_rate=0.05),
            history,
            *callbacks,
            ModelCheckpoint(directory, **saving),
        ],
        **{
            "seed": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **options,
        },
    )
    trainer.fit(
        module,
        DataLoader(toy_data(80), 8, shuffle=True),
        DataLoader(toy_data(32, seed=1), 8),
        ckpt_path=ckpt_path,
    )
    return module, history, trainer


class Stopped(BaseException):
    """The run is over; like a signal it is no Exception."""


def stopped_run(directory: Path, moment: str, **options: Any) -> None:
    """Leaves in ``directory`` what SIGKILL at ``moment`` leaves there: nothing that the run writes later."""
    snapshot = directory.with_name(directory.name + "-snapshot")

    def stop() -> None:
        shutil.copytree(directory, snapshot)
        raise Stopped

    try:
        run(directory, StopAt(moment, stop), **options)
    except Stopped:
        shutil.rmtree(directory)
        snapshot.rename(directory)
    else:
        raise AssertionError(f"{moment!r} never came")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), StopAt("client trained", lambda: os.kill(os.getpid(), signal.SIGKILL)))
