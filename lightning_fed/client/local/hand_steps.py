"""How often the user's code steps schedules by hand, in manual optimization: nothing but a local fit tells."""

from __future__ import annotations

import math
from functools import wraps
from typing import Any

from lightning_fed.client.local.elapsed import ByHand, Pace, Plan, assumed, declared_paces, elapsed, require_known
from lightning_fed.errors import ClientError


class HandSteps:
    """Counts in a local fit how often schedules are stepped, and finds out by which rule.

    Args:
        trainer: The client's trainer, about to train, with its schedules where they begin.
        plan: What a round is.
        known: What an earlier fit of the client has told, if any.
        schedules: Whether the schedules are to follow the global round.

    Attributes:
        used: What the fit begins with: what is known, else what ``configure_optimizers`` says.
    """

    def __init__(self, trainer: Any, plan: Plan, known: ByHand | None, schedules: bool) -> None:
        self._trainer, self._plan = trainer, plan
        self._configs = trainer.lr_scheduler_configs if schedules else []
        self._known = known if known is not None and len(known.paces) == len(self._configs) else None
        self.used = self._known or assumed(trainer, plan, self._configs)
        self._counts = [0] * len(self._configs)

    def begin(self) -> None:
        """Count from here on."""
        self._first_epoch = self._trainer.current_epoch
        for i, config in enumerate(self._configs):
            config.scheduler.step = self._counted(config.scheduler.step, i)

    def _counted(self, step: Any, i: int) -> Any:
        @wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._counts[i] += 1
            return step(*args, **kwargs)

        return counted

    def told(self, round: int) -> ByHand:
        """Return what the fit, which is over, has told.

        Raises:
            ClientError: If it is no rule that tells where a schedule would be in another round.
        """
        loop = self._trainer.fit_loop.epoch_loop
        batches = loop.batch_progress.total.ready
        found = [self._pace(i, config, batches) for i, config in enumerate(self._configs)]
        for config, count, pace in zip(self._configs, self._counts, found, strict=True):
            if pace is None:
                raise ClientError(
                    f"has a {type(config.scheduler).__name__} that its module steps by hand, {count} times in the"
                    f" {batches} batches of round {round}: nothing tells how far all rounds before would have taken it."
                    " Write FederatedTrainer(client_state='carry'), or say in configure_optimizers how often it is"
                    " stepped: {'scheduler': ..., 'interval': 'epoch', 'frequency': 10}."
                )
        paces = tuple(pace for pace in found if pace is not None)
        told = ByHand(paces, batches if self._plan.steps else None, self._steps(loop.global_step, round))
        schedules = [(config.scheduler, pace) for config, pace in zip(self._configs, told.paces, strict=True)]
        end = elapsed(self._trainer, self._plan, round, told)
        require_known(schedules, end, self._trainer.num_training_batches)
        return told

    def _steps(self, steps: int, round: int) -> int:
        """Return the optimizer steps of a round, of an epoch where rounds have unequal ones; -1 if these differ.

        Raises:
            ClientError: If they do, and the user's code asked how many steps there were before.
        """
        if not self._plan.by_round:
            return steps
        each, rest = divmod(steps, self._plan.epochs or 1)
        before = None if self._known is None else self._known.steps
        if not rest and before in (None, each):
            return each
        if self._trainer.was_asked:
            raise ClientError(
                "has a module that asks for global_step and takes its optimizer steps by hand, not equally many in each"
                f" epoch ({steps} in the {self._plan.epochs} of round {round}): nothing tells how many it took in all"
                " rounds before, for local_epochs= changes from round to round. Write one number for all rounds."
            )
        return -1

    def misled(self, told: ByHand | None) -> bool:
        """Return whether the fit began in the wrong place for want of what it has told."""
        if self._known is not None or told is None or self._trainer.task.round == 1:
            return False
        return told[:2] != self.used[:2] or (self._trainer.was_asked and told.steps is not None)

    def _pace(self, i: int, config: Any, batches: int) -> Pace | None:
        if self._known is not None:
            return self._known.paces[i] if self._explains(self._known.paces[i], i, batches) else None
        rules = [*declared_paces([config]), Pace("epoch", 1), Pace("step", 1)]
        if not self._plan.by_round:  # of which another round has others
            rules.append(Pace("round", self._counts[i]))
        return next((pace for pace in rules if self._explains(pace, i, batches)), None)

    def _explains(self, pace: Pace, i: int, batches: int) -> bool:
        """Return whether a rule gives what was counted."""
        count, (interval, frequency) = self._counts[i], pace
        if interval == "round":
            return count == frequency > 0
        length = self._trainer.num_training_batches
        if length == math.inf:
            epochs, rest = self._plan.epochs or 0, batches if self._plan.epochs is None else 0
        else:
            epochs, rest = divmod(batches, length)
        if interval == "step":
            if length == math.inf:
                return frequency == 1 and count == batches
            return count == epochs * (length // frequency) + rest // frequency
        last = self._first_epoch + epochs
        whole = last // frequency - self._first_epoch // frequency
        # on_train_epoch_end comes at a round's end, too, where local_steps end it within an epoch.
        ended = bool(rest) and (last + 1) % frequency == 0
        return count in (whole, whole + ended)
