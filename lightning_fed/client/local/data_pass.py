"""A pass over a client's data before its fit: a fit of one epoch, of which methods take what they have seen."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelPruning

from lightning_fed.client.local.fit import local_fit
from lightning_fed.client.local.work import LocalWork
from lightning_fed.errors import ClientError
from lightning_fed.values.weights import Weights

# What is behind a method's name in the names of what its part in the pass has.
BEFORE = "/before"
# What these of Lightning's do is done at steps, or after them: it is no part of the objective.
_OF_STEPS = (GradientAccumulationScheduler, ModelPruning)


def data_pass(work: LocalWork) -> Weights:
    """Return what the methods' parts in the pass send, by ``"method/before/name"``; empty where none has one.

    The fit proper finds all as if there had been no pass: weights and buffers are loaded for it, the rest is restored.
    It has copies of the client callbacks, as they begin the fit proper. Schedules stand still, and batches are not
    accumulated.
    """
    if (callbacks := work.options.pass_before) is None:
        return {}
    options = replace(
        work.options,
        callbacks=[callback for callback in work.options.callbacks if not isinstance(callback, _OF_STEPS)],
        method_callbacks=lambda: [*callbacks(), OneEpoch()],
        client_state="reset",
        trainer={**work.options.trainer, "accumulate_grad_batches": 1},
    )
    task = replace(work.task, state=None)
    sent = local_fit(replace(work, task=task, options=options)).sent
    return {name: tensor for name, tensor in sent.items() if f"{BEFORE}/" in name}


class OneEpoch(Callback):
    """Ends a fit after one pass over the data, however many steps or epochs a round has."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lift a limit of steps, and hold schedules, which know of no such steps."""
        loop = trainer.fit_loop.epoch_loop
        if loop.max_steps != -1 and trainer.num_training_batches == math.inf:
            raise ClientError(
                "has a loader without length and trains local_steps= a round: nothing tells where a pass over its data"
                " would end. Give the loader a length, or write local_epochs=."
            )
        loop.max_steps = -1
        for config in trainer.lr_scheduler_configs:
            config.scheduler.step = _stand_still  # type: ignore[method-assign]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the fit; raises if there is more data."""
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            raise ClientError(
                "ends the pass over its data before its fit too early (something sets trainer.should_stop within an"
                " epoch): a method has no gradient over all of it. Let it end fits between epochs."
            )
        trainer.should_stop = True


def _stand_still(*_: object, **__: object) -> None:
    """Stand in for a schedule's step."""
