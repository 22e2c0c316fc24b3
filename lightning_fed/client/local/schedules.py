"""Takes a client's schedules, and the layers that finetuning has unfrozen, to where one long local fit would be."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from lightning_fed._compat.torch import count_steps, schedules_in, set_stepped
from lightning_fed.client.local.elapsed import Accumulation, Elapsed, Pace, elapsed, require_known, start_at_epoch
from lightning_fed.views import overrides

# What these give depends on how often they were stepped, and not on what they gave before.
_COUNTS = (LambdaLR, OneCycleLR)
# These by where they are and what the learning rate is, and by no function of the user's.
_BY_STATE = {
    getattr(lr_scheduler, name)
    for name in (
        *("StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR", "CosineAnnealingLR"),
        *("CosineAnnealingWarmRestarts", "SequentialLR", "ChainedScheduler"),
    )
}
# How schedules began -> how many steps they were taken -> their state then.
_memory: dict[bytes, dict[int, bytes]] = {}
_FEW, _MANY = 50, 100
# One that has not changed anything after so many steps is constant.
_LONG = 10_000


class _Way:
    """The way from the beginning of an epoch to where a round begins.

    Args:
        trainer: A client's trainer whose data is set up.
        begin: The epoch.
        end: Where it leads to.
        rounds: The rounds that have led there.
    """

    def __init__(self, trainer: Any, begin: int, end: Elapsed, rounds: int) -> None:
        self._trainer, self.begin, self.end, self.rounds = trainer, begin, end, rounds
        self._by_hand = not trainer.lightning_module.automatic_optimization
        self._accumulated = Accumulation(trainer)
        self._batches = trainer.num_training_batches
        self._length = 0 if self._batches == math.inf else self._batches

    def count(self, pace: Pace) -> int:
        """Return how often a schedule is stepped."""
        end = self.end
        if pace.interval == "round":
            return self.rounds * pace.frequency
        if end.epochs is None:
            return end.batches if self._by_hand else end.steps or 0
        if pace.interval == "epoch":
            return end.epochs // pace.frequency - self.begin // pace.frequency
        partial = len(self.fires(pace, end.epochs)) if end.batches else 0
        if self._accumulated.changes:
            return partial + sum(len(self.fires(pace, epoch)) for epoch in range(self.begin, end.epochs))
        return partial + (end.epochs - self.begin) * len(self.fires(pace, -1))

    def fires(self, pace: Pace, epoch: int) -> Sequence[int]:
        """Return the batches of an epoch, from 1, after which a schedule by step is stepped."""
        every = 1 if self._by_hand else self._accumulated(epoch)
        last = self.end.batches if epoch == self.end.epochs else self._batches
        stepped = range(pace.frequency, last + 1, pace.frequency)
        return stepped if every == 1 else [i for i in stepped if i % every == 0 or i == self._batches]

    def tell_the_time(self, epoch: int, batches: int | None = None) -> None:
        """Let the trainer tell the time of a step on the way: schedules have functions of the user's, which may ask.

        Args:
            epoch: The epoch in which it would be; the round where nobody knows how many epochs there were.
            batches: Those of the epoch, or then those of all rounds, that are trained by then; ``None`` for all.
        """
        start_at_epoch(self._trainer, epoch)
        self._trainer.steps_before = self._steps(epoch, self._length if batches is None else batches)

    def _steps(self, epoch: int, batches: int) -> int | None:
        end = self.end
        if end.steps is None:
            return None
        if self._by_hand:  # as many steps with each batch as there are on the average
            whole, passed = (0, 0) if end.epochs is None else (end.epochs * self._length, epoch * self._length)
            return end.steps * (passed + batches) // max(1, whole + end.batches)
        if end.epochs is None:
            return math.ceil(batches / self._accumulated(0))
        return self._accumulated.steps(epoch, self._length) + math.ceil(batches / self._accumulated(epoch))

    def tell_the_last_time(self, pace: Pace) -> None:
        """Let the trainer tell the time of a schedule's last step; of its beginning if it is never stepped."""
        end = self.end
        if end.epochs is None:
            self.tell_the_time(self.rounds - 1, end.batches)
        elif pace.interval == "epoch" and end.epochs >= pace.frequency:
            self.tell_the_time(end.epochs // pace.frequency * pace.frequency - 1)
        else:
            epochs = range(end.epochs, -1, -1) if pace.interval == "step" else ()
            fires = ((epoch, self.fires(pace, epoch)) for epoch in epochs)
            self.tell_the_time(*next(((epoch, batches[-1]) for epoch, batches in fires if batches), (0, 0)))

    def tell_the_end_of(self, round: int) -> None:
        """Let the trainer tell the time at the end of a round."""
        end, passed = self.end, self.end.batches + (self.end.epochs or 0) * self._length
        if end.epochs is None or not self._length:
            self.tell_the_time((end.epochs or self.rounds) * round // self.rounds - 1, passed * round // self.rounds)
        else:
            epoch, batch = divmod(passed * round // self.rounds - 1, self._length)
            self.tell_the_time(epoch, batch + 1)


class Replay:
    """Takes schedules and finetuning callbacks to where a long fit would have taken them.

    Args:
        trainer: The client's trainer, about to train.
        paces: How often each of its schedules is stepped; empty to leave schedules where they are.
        finetuning: Callbacks that freeze and unfreeze by epoch.
    """

    def __init__(self, trainer: Any, paces: Sequence[Pace], finetuning: Sequence[BaseFinetuning]) -> None:
        self._trainer, self._module, self._finetuning = trainer, trainer.lightning_module, finetuning
        by_hand = not self._module.automatic_optimization
        self._hook = not by_hand and overrides(self._module, LightningModule, "lr_scheduler_step")
        self._schedules = [(c.scheduler, pace) for c, pace in zip(trainer.lr_scheduler_configs, paces, strict=False)]

    def go(self, begin: int, end: Elapsed, rounds: int) -> None:
        """Go from the beginning of an epoch to where ``end`` says, which some rounds have led to.

        Raises:
            ClientError: If a schedule counts what nobody knows.
        """
        require_known(self._schedules, end, self._trainer.num_training_batches)
        way = _Way(self._trainer, begin, end, rounds)
        with _as_if_stepped(schedule for schedule, _ in self._schedules):
            together = []
            for schedule, pace in self._schedules if rounds else ():
                if pace.interval == "round":
                    self._go_by_round(way, schedule, pace)
                elif self._is_alone(schedule) and _leaps(schedule):
                    way.tell_the_last_time(pace)
                    _step(schedule, way.count(pace))
                else:
                    together.append((schedule, pace))
            if together or self._finetuning:
                self._walk(way, together)

    def _is_alone(self, schedule: Any) -> bool:
        """Return whether nobody else changes what a schedule changes."""
        of_its_optimizer = sum(other.optimizer is schedule.optimizer for other, _ in self._schedules)
        return of_its_optimizer == 1 and not self._hook and not self._finetuning

    def _go_by_round(self, way: _Way, schedule: Any, pace: Pace) -> None:
        """Step a schedule of which nothing tells when in a round it is stepped; so at the end."""
        for round in range(1, way.rounds + 1):
            way.tell_the_end_of(round)
            self._step_each([schedule] * pace.frequency)

    def _walk(self, way: _Way, schedules: Sequence[tuple[Any, Pace]]) -> None:
        """Epoch by epoch, in Lightning's order."""
        end = way.end
        by_step = [(schedule, pace) for schedule, pace in schedules if pace.interval == "step"]
        for epoch in range(way.begin, way.rounds if end.epochs is None else end.epochs + bool(end.batches)):
            start_at_epoch(self._trainer, epoch)
            for callback in self._finetuning:
                callback.on_train_epoch_start(self._trainer, self._module)
            if end.epochs is None:  # then current_epoch counts rounds
                every = way.count(Pace("step", 1)) // way.rounds
                for i in range(every * epoch, every * (epoch + 1)) if by_step else ():
                    way.tell_the_time(epoch, (i + 1) * end.batches // (every * way.rounds))
                    self._step_each(schedule for schedule, _ in by_step)
                continue
            if by_step:
                self._walk_batches(way, epoch, by_step)
            ends = [(s, pace.frequency) for s, pace in schedules if pace.interval == "epoch"]
            if epoch < end.epochs and ends:
                way.tell_the_time(epoch)
                self._step_each(schedule for schedule, every in ends if (epoch + 1) % every == 0)

    def _walk_batches(self, way: _Way, epoch: int, by_step: Sequence[tuple[Any, Pace]]) -> None:
        fires = [(schedule, set(way.fires(pace, epoch))) for schedule, pace in by_step]
        for i in sorted(set[int]().union(*(batches for _, batches in fires))):
            way.tell_the_time(epoch, i)
            self._step_each(schedule for schedule, batches in fires if i in batches)

    def _step_each(self, schedules: Iterable[Any]) -> None:
        for schedule in schedules:
            if self._hook:
                self._module.lr_scheduler_step(schedule, None)
            else:
                schedule.step()


def _leaps(schedule: Any) -> bool:
    """Return whether it is no matter when the steps before its last are."""
    return type(schedule) in _COUNTS or _goes_by_its_state(schedule)


def _step(schedule: Any, times: int) -> None:
    """Step a schedule so many times; at once where only how often counts.

    One that is not stepped at all is asked once more for what it begins with, at the time that the trainer tells.
    """
    if type(schedule) in _COUNTS:
        count_steps(schedule, times - 1)
        times = 1
    elif times > _FEW and _goes_by_its_state(schedule):
        _step_from_memory(schedule, times)
        return
    for _ in range(times):
        schedule.step()


def _goes_by_its_state(schedule: Any) -> bool:
    """Return whether what a schedule does follows from its ``state_dict`` and the optimizer's options."""
    has_functions = any(callable(value) for value in vars(schedule).values())
    inner = schedules_in(schedule)
    return type(schedule) in _BY_STATE and not has_functions and all(_goes_by_its_state(one) for one in inner)


def _step_from_memory(schedule: Any, times: int) -> None:
    """Step a schedule on from where one that began alike has been before: in an earlier round, or another client's."""
    optimizer = schedule.optimizer
    began = pickle.dumps((type(schedule).__qualname__, schedule.state_dict(), _options(optimizer)))
    reached = _memory.pop(began, {})
    if done := max((steps for steps in reached if steps <= times), default=0):
        state, options = pickle.loads(reached[done])
        schedule.load_state_dict(state)
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)
    for _ in range(times - done):
        schedule.step()
    reached[times] = pickle.dumps((schedule.state_dict(), _options(optimizer)))
    _memory[began] = reached
    if len(reached) > _MANY:
        reached.pop(next(iter(reached)))
    if len(_memory) > _MANY:
        _memory.pop(next(iter(_memory)))


def stands_still(trainer: Any, config: Any) -> bool:
    """Return whether a schedule that begins anew each round changes nothing within one, though it would in the run.

    Args:
        trainer: A client's trainer whose optimizers and data are set up; its schedule is stepped.
        config: The schedule, as Lightning describes it.
    """
    module, plan, schedule = trainer.lightning_module, trainer.plan, config.scheduler
    own = not module.automatic_optimization or overrides(module, LightningModule, "lr_scheduler_step")
    endless = trainer.num_training_batches == math.inf
    if own or (endless and (config.interval == "step" or plan.epochs is None)):
        return False
    # What comes after a round's last batch changes nothing that anybody sees.
    if plan.epochs is None:
        last = elapsed(trainer, replace(plan, steps=plan.steps - 1), 1)
    else:
        last = Elapsed(plan.most_epochs - 1, 0 if endless else trainer.num_training_batches - 1, None)
    seen = _Way(trainer, 0, last, 1).count(Pace(config.interval, config.frequency))
    if isinstance(schedule, ReduceLROnPlateau):
        return seen < schedule.patience + 2  # the best, and more bad ones than it has patience for
    with _as_if_stepped([schedule]), suppress(Exception):
        return not _changes(schedule, seen) and _changes(schedule, _LONG)
    return False


def _changes(schedule: Any, steps: int) -> bool:
    before = _options(schedule.optimizer)
    for _ in range(steps):
        schedule.step()
        if _options(schedule.optimizer) != before:
            return True
    return False


def _options(optimizer: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


@contextmanager
def _as_if_stepped(schedules: Iterable[Any]) -> Iterator[None]:
    """Let torch take the optimizers of schedules for stepped, before which it warns of a schedule's first step.

    A filter for that warning, set for each fit, would make Python give all others again that it has given once.
    """
    optimizers = [schedule.optimizer for schedule in schedules if hasattr(schedule, "optimizer")]
    before = [set_stepped(optimizer, True) for optimizer in optimizers]
    try:
        yield
    finally:
        for optimizer, stepped in zip(optimizers, before, strict=True):
            set_stepped(optimizer, stepped)
