"""A client's own copies of the user's client callbacks, and the state that these keep from round to round."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, SpikeDetection

from lightning_fed.client.local.as_configured import shared
from lightning_fed.client.local.fit_state import dump_callbacks, load_callbacks
from lightning_fed.client.local.trainer import LocalTrainer
from lightning_fed.views import overrides


def own_copies(
    callbacks: Sequence[Callback], module: LightningModule, datamodule: LightningDataModule | None
) -> list[Callback]:
    """Copy of callbacks that hold the module's own layers and tensors, and the datamodule itself."""
    if not callbacks:
        return []
    memo = shared(module)
    if datamodule is not None:
        memo[id(datamodule)] = datamodule
    return copy.deepcopy(list(callbacks), memo)


def keeps_state(callback: Callback) -> bool:
    """Return whether a callback has a state that a client keeps.

    Finetuning callbacks have none: what they have done follows from the epoch.
    """
    return overrides(callback, Callback, "state_dict") and not isinstance(callback, BaseFinetuning)


class CallbackStates(Callback):
    """Gives a run's callbacks what they kept, when Lightning would restore it, and takes what they keep.

    The last of the callbacks: it comes when all others have been set up, and when all have ended their training.

    Args:
        callbacks: Those that keep state.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(trainer, LocalTrainer)
        states = load_callbacks(trainer.task.callback_states)
        for callback in self._callbacks:
            if isinstance(callback, SpikeDetection):  # Lightning's own asks for an attribute that it does not have
                callback.running = callback.running_mean  # type: ignore[attr-defined]
            if callback.state_key in states:
                callback.load_state_dict(states[callback.state_key])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer, LocalTrainer)
        trainer.task = replace(trainer.task, callback_states=dump_callbacks(self._callbacks))
