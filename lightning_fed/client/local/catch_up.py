"""Takes a client's fit, about to train, to where its client is in the run: epoch, steps, schedules, frozen layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import BaseFinetuning
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_fed._compat.lightning import set_last_reload
from lightning_fed.client.local.elapsed import Elapsed, declared_paces, elapsed, start_at_epoch
from lightning_fed.client.local.fit_state import FitState
from lightning_fed.client.local.hand_steps import HandSteps
from lightning_fed.client.local.schedules import Replay
from lightning_fed.errors import ClientError


def catch_up(trainer: Any, client_state: str, kept: FitState) -> HandSteps | None:
    """Take a fit to where one long fit of its client would be.

    Args:
        trainer: A ``LocalTrainer`` whose optimizers and data are set up.
        client_state: What becomes of optimizers and schedulers from round to round.
        kept: What the client kept of its last fit.

    Returns:
        What counts how the user's code steps schedules by hand, where that has to be known.

    Raises:
        ClientError: If a schedule has no place in the global round, or none that can be known.
    """
    plan, before, first_epoch = trainer.plan, trainer.task.round - 1, trainer.current_epoch
    follows = client_state == "global" and plan.rounds != 1 and bool(trainer.lr_scheduler_configs)
    if follows and (placeless := without_place(trainer.lr_scheduler_configs)):
        raise ClientError(f"has {placeless}.")
    by_hand = not trainer.lightning_module.automatic_optimization
    hand = HandSteps(trainer, plan, kept.by_hand, follows) if by_hand else None
    paces = declared_paces(trainer.lr_scheduler_configs) if hand is None else hand.used.paces
    end = elapsed(trainer, plan, before, None if hand is None else hand.used)
    finetuning = [callback for callback in trainer.callbacks if isinstance(callback, BaseFinetuning)]
    begun = _take_up(trainer, kept, finetuning) if client_state == "carry" and kept.optimizers else 0
    if follows or finetuning:
        Replay(trainer, paces if follows else (), finetuning).go(begun, end, before)
    start_at_epoch(trainer, first_epoch)
    trainer.steps_before = end.steps if before else 0
    if end.epochs is not None:
        # The number that a sampler is told stays: a round begins its data anew, also within an epoch.
        trainer.fit_loop.epoch_progress.current.completed = end.epochs
        set_last_reload(trainer.fit_loop, end.epochs)
    if begun > trainer.current_epoch or (end.batches and end.epochs is not None):
        for callback in finetuning:
            _leave_out_once(callback)
    if hand is not None:
        hand.begin()
    return hand


def left_behind(trainer: Any, client_state: str, hand: HandSteps | None) -> FitState:
    """Return what a client keeps of a fit that is over, for the next one to catch up with.

    Raises:
        ClientError: If its module steps a schedule by hand, and by no rule that could be found.
    """
    state = FitState()
    if client_state == "carry":
        finetuning = [callback for callback in trainer.callbacks if isinstance(callback, BaseFinetuning)]
        state = FitState.of(trainer, {callback.state_key: callback.state_dict() for callback in finetuning})
    if hand is not None and trainer.plan.rounds != 1:
        state.by_hand = hand.told(trainer.task.round)
    return state


def without_place(configs: Sequence[Any]) -> str | None:
    """Return what is said of a schedule that follows a metric, where schedules are to follow the global round."""
    for config in configs:
        if config.reduce_on_plateau or isinstance(config.scheduler, ReduceLROnPlateau):
            return (
                f"a {type(config.scheduler).__name__}, which follows what a client measures and has no schedule to take"
                " from the global round: write FederatedTrainer(client_state='carry'), which keeps it with the client"
            )
    return None


def _take_up(trainer: Any, kept: FitState, finetuning: Sequence[BaseFinetuning]) -> int:
    """Give a fit what its client kept, and say how many epochs that has behind it.

    What finetuning did in these is done again first, for it made the optimizers' groups.
    """
    Replay(trainer, (), finetuning).go(0, Elapsed(kept.begun, 0, None), 0)
    kept.load_into(trainer)
    for callback in finetuning:
        if callback.state_key in kept.callbacks:
            callback.load_state_dict(kept.callbacks[callback.state_key])
    return kept.begun


def _leave_out_once(callback: BaseFinetuning) -> None:
    """For the beginning of an epoch that has begun in the round before."""

    def nothing(*_: Any) -> None:
        del callback.__dict__["on_train_epoch_start"]

    callback.__dict__["on_train_epoch_start"] = nothing
