"""Callbacks as the server sees them: views over those whose training is the clients'."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from lightning_fed.client.local.trainer import LocalTrainer
from lightning_fed.server import placement
from lightning_fed.views import View, users_own


class TrainsOnClients(View):
    """A module's callback that acts on training: at the server it validates, tests and predicts, and does not train.

    The clients have copies of it, or the very callback where it is a layer of the module.
    """


def _on_clients(name: str) -> Any:
    def hook(self: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if isinstance(trainer, LocalTrainer):
            users_own(self, name)(trainer, *args, **kwargs)

    return hook


for _hook in (
    *("on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end"),
    *("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad"),
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step"),
):
    setattr(TrainsOnClients, _hook, _on_clients(_hook))


class MonitorsClients(View):
    """A ``LearningRateMonitor``: the rates are those that clients report, and are logged with their metrics."""

    log_momentum: bool
    lrs: dict[str, list[float]]
    last_momentum_values: dict[str, float]
    last_weight_decay_values: dict[str, float]

    def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        # Whether optimizers have momentum the clients' own say: the server's stands for theirs.
        log_momentum, self.log_momentum = self.log_momentum, False
        try:
            users_own(self, "on_train_start")(trainer, *args, **kwargs)
        finally:
            self.log_momentum = log_momentum
        self.lrs, self.last_momentum_values, self.last_weight_decay_values = {}, {}, {}

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_train_epoch_start(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        names = trainer.round_about.rates
        for name, value in trainer.round_metrics.items():
            of, _, what = name.rpartition("-")
            if name not in names:
                continue
            if of in names and what in ("momentum", "weight_decay"):
                last = self.last_momentum_values if what == "momentum" else self.last_weight_decay_values
                last[name] = value
            else:
                self.lrs.setdefault(name, []).append(value)


class SavesOnceARound(View):
    """A ``ModelCheckpoint``: what it saves by steps or time it saves when the round is over, with its validation.

    To Lightning a round's one step comes before its validation, and is one by hand, for which a ``ModelCheckpoint``
    knows neither ``train_time_interval`` nor when a metric is of the round before.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._round_step = args

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        step = self.__dict__.pop("_round_step", None)
        if step is not None:  # a run that is resumed after a round's step has none
            self._save_by_step(trainer, pl_module, step)
        users_own(self, "on_train_epoch_end")(trainer, pl_module)
        if trainer.clients_validate:
            users_own(self, "on_validation_end")(trainer, pl_module)

    def _save_by_step(self, trainer: Any, pl_module: LightningModule, step: tuple[Any, ...]) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        last, progress.is_last_batch = progress.is_last_batch, False  # or it would wait for the validation
        trainer.seems_automatic = True
        try:
            users_own(self, "on_train_batch_end")(trainer, pl_module, *step)
        finally:
            trainer.seems_automatic, progress.is_last_batch = False, last


class ChecksOnceARound(View):
    """What looks at a validation: where the clients alone validate, the round's end is the end of it.

    ``EarlyStopping``, and what reports to a sweep, of which Optuna may end the trial there and then.
    """

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        users_own(self, "on_train_epoch_end")(trainer, pl_module)
        if trainer.clients_validate:
            users_own(self, "on_validation_end")(trainer, pl_module)


# The views of Lightning's own callbacks in the server's fit.
_VIEWS: dict[type[Callback], type[View]] = {
    LearningRateMonitor: MonitorsClients,
    ModelCheckpoint: SavesOnceARound,
    EarlyStopping: ChecksOnceARound,
}


def views_of(callback: Callback) -> list[type[View]]:
    """Return the views that a callback has in the server's fit."""
    views = [view for kind, view in _VIEWS.items() if isinstance(callback, kind)]
    return [*views, ChecksOnceARound] if placement.reports_to_a_sweep(callback) else views
