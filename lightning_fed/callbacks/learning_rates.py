"""Clients' learning rates, for a ``LearningRateMonitor`` at the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor

from lightning_fed._compat.lightning import rates
from lightning_fed.callbacks.base import FederatedCallback
from lightning_fed.values.metrics import LAST, RATE, MetricState


class LearningRates(FederatedCallback):
    """Lets clients report what ``LearningRateMonitor`` logs in a plain fit, under the same names.

    Args:
        monitors: Those at the server, who tell what to report.
    """

    def __init__(self, monitors: Sequence[LearningRateMonitor]) -> None:
        self.momentum = any(monitor.log_momentum for monitor in monitors)
        self.weight_decay = any(monitor.log_weight_decay for monitor in monitors)

    def local_callbacks(self) -> Sequence[Callback]:
        """Return the callback that reports."""
        return [ReportLearningRates(self.momentum, self.weight_decay)]


class ReportLearningRates(Callback):
    """Reports a client's learning rates at the start of the last epoch of its local fit.

    Args:
        momentum: Whether to report the optimizers' momentum.
        weight_decay: Whether to report their weight decay.
    """

    acts_elementwise = True  # it reads options of optimizers, which vectorized clients share

    def __init__(self, momentum: bool, weight_decay: bool) -> None:
        self._monitor = LearningRateMonitor("epoch", momentum, weight_decay)
        self._found: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the names."""
        self._monitor.on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the rates."""
        self._found = rates(self._monitor, trainer)

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Report them beside what the module has logged."""
        states = [
            MetricState(name, LAST, {"value": torch.tensor(float(rate), dtype=torch.float64)}, RATE)
            for name, rate in self._found.items()
        ]
        trainer.report(states)
