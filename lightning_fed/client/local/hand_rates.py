"""Learning rates that the user's code sets by hand, where the next local fit has new optimizers and does not know them.

A rate that is set before each step is right in every fit. One that is set after a step, or once, is lost with the fit:
its client finds that out in its next one, at the first step, and says it.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch.optim import Optimizer

from lightning_fed._compat.torch import last_rates
from lightning_fed.views import overrides

Rates = list[list[float]]
# How a fit ended, and the round that has to take it up; 0 for any, where no schedule goes on meanwhile.
Ended = tuple[int, Rates]


class HandRates:
    """Watches the learning rates of one local fit.

    Args:
        trainer: The client's trainer, with its optimizers as they begin.
        ended: How the client's last fit did, if it was with rates that may have been set by hand.

    Attributes:
        notes: What is to be said to the user.
    """

    def __init__(self, trainer: Any, ended: Ended | None) -> None:
        self._trainer = trainer
        self._given = _rates(trainer)
        self._kept = ended[1] if ended is not None and ended[0] in (0, trainer.current_round) else None
        self.notes: list[str] = []
        watched = trainer.optimizers if self._kept else ()
        self._handles = [optimizer.register_step_pre_hook(self._first_step) for optimizer in watched]

    def _first_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Return whether the rates were set again, as before each step; if not, this one is not what it would be."""
        if self._kept is None:
            return
        kept, self._kept = self._kept, None
        if _rates(self._trainer) == self._given and not _alike(kept, self._given):
            begun, ended = ("/".join(f"{rate:g}" for rates in all for rate in rates) for all in (self._given, kept))
            self.notes.append(
                "Learning rates that are set by hand (a warm-up in optimizer_step, a hook, ...) are lost with a"
                " client's local fit:"
                f" one ended with {ended}, and its next one began with {begun}, for"
                " client_state='global' gives each new optimizers. Write them as a schedule (LambdaLR), which follows"
                " the global round, or write FederatedTrainer(client_state='carry')."
            )

    def left(self) -> Ended | None:
        """Return how a fit that is over left rates that neither ``configure_optimizers`` nor a schedule gave."""
        for handle in self._handles:
            handle.remove()
        rates = _rates(self._trainer)
        if rates == self._given:
            return None
        if not self._are_scheduled(rates):
            return 0, rates
        # Most schedules go on from whatever rate they find: only the next round tells whether they alone gave it.
        writes = overrides(self._trainer.lightning_module, LightningModule, "optimizer_step")
        return (self._trainer.current_round + 1, rates) if writes else None

    def _are_scheduled(self, rates: Rates) -> bool:
        """Return whether each optimizer has what it began with, or what a schedule gave it last."""
        if overrides(self._trainer.lightning_module, LightningModule, "lr_scheduler_step"):
            return True
        for optimizer, own, given in zip(self._trainer.optimizers, rates, self._given, strict=True):
            schedules = [config.scheduler for config in self._trainer.lr_scheduler_configs]
            schedules = [schedule for schedule in schedules if getattr(schedule, "optimizer", optimizer) is optimizer]
            lasts = [last_rates(schedule, own) for schedule in schedules]
            if own not in (given, *([float(rate) for rate in last] for last in lasts)):
                return False
        return True


def finetunes(trainer: Any) -> bool:
    """Return whether a callback freezes layers and sets their rates by epoch: it is taken to where it would be."""
    return any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks)


def _rates(trainer: Any) -> Rates:
    return [[float(group.get("lr", 0)) for group in optimizer.param_groups] for optimizer in trainer.optimizers]


def _alike(one: Rates, other: Rates) -> bool:
    """But for rounding."""
    same = [len(rates) for rates in one] == [len(rates) for rates in other]
    return same and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(chain(*one), chain(*other), strict=True))
