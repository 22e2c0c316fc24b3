"""How far one long local fit of a client would be when a round begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

from lightning_fed.errors import ClientError
from lightning_fed.values.by_round import total


@dataclass(frozen=True)
class Plan:
    """How a run divides a client's training into rounds.

    Attributes:
        epochs: Local epochs of the round at hand, or ``None`` where ``steps`` counts.
        steps: Local optimizer steps a round, or ``None``.
        rounds: The rounds of the run, or -1 for no limit.
        anew: Whether schedules begin anew each round.
        by_round: The local epochs of each round, of which the last goes on, where they change.
    """

    epochs: int | None = 1
    steps: int | None = None
    rounds: int = -1
    anew: bool = False
    by_round: tuple[int, ...] = ()

    @property
    def most_epochs(self) -> int:
        """The epochs of the round that has the most."""
        return max(self.by_round or (self.epochs or 0,))

    def epochs_in(self, rounds: int) -> int:
        """Return the epochs of the first rounds, 0 where ``steps`` counts."""
        return total(self.by_round or self.epochs or 0, rounds)

    def limits(self) -> tuple[int, int]:
        """Return the epochs and the optimizer steps of the run, -1 for what does not limit them."""
        epochs = -1 if self.epochs is None or self.rounds == -1 else self.epochs_in(self.rounds)
        return epochs, -1 if self.steps is None or self.rounds == -1 else self.steps * self.rounds


class Elapsed(NamedTuple):
    """How far one long fit of a client would be.

    Attributes:
        epochs: The whole epochs behind it; ``None`` where nothing tells.
        batches: The batches of the next epoch behind it; of all epochs where nothing tells how many these are.
        steps: The optimizer steps behind it; ``None`` where nothing tells.
    """

    epochs: int | None
    batches: int
    steps: int | None


class Pace(NamedTuple):
    """How often a schedule is stepped: every so many epochs or batches, or so often a round (``"round"``)."""

    interval: str
    frequency: int


class ByHand(NamedTuple):
    """What a local fit tells of manual optimization.

    Attributes:
        paces: How often the user's code steps each schedule.
        batches: The batches of a round of ``local_steps``, else ``None``.
        steps: The optimizer steps of a round, of an epoch where rounds have unequal ones; ``None`` where nothing
            tells yet, -1 where nothing will.
    """

    paces: tuple[Pace, ...] = ()
    batches: int | None = None
    steps: int | None = None


def declared_paces(configs: Sequence[Any]) -> tuple[Pace, ...]:
    """Return how often schedules are stepped by what ``configure_optimizers`` says of them."""
    # In manual optimization Lightning takes any word for an interval.
    return tuple(Pace("step" if config.interval == "step" else "epoch", config.frequency) for config in configs)


def assumed(trainer: Any, plan: Plan, configs: Sequence[Any]) -> ByHand:
    """Return what is taken for granted of manual optimization as long as no local fit has told otherwise.

    Schedules are stepped as ``configure_optimizers`` says, and each batch steps each optimizer once.
    """
    batches = None if plan.steps is None else math.ceil(plan.steps / max(1, len(trainer.optimizers)))
    return ByHand(declared_paces(configs), batches, plan.steps)


def elapsed(trainer: Any, plan: Plan, rounds: int, by_hand: ByHand | None = None) -> Elapsed:
    """Return how far one long fit would be after some rounds, on as many batches an epoch as the client has now.

    Args:
        trainer: The client's trainer, whose data is set up.
        plan: What a round is.
        rounds: The rounds before.
        by_hand: What is known of manual optimization; ``None`` where Lightning optimizes.
    """
    batches, accumulated = trainer.num_training_batches, Accumulation(trainer)
    endless = batches == math.inf
    if by_hand is not None:
        parts = plan.epochs_in(rounds) if plan.by_round else rounds
        steps = None if by_hand.steps in (None, -1) else by_hand.steps * parts
        if plan.epochs is not None:
            return Elapsed(plan.epochs_in(rounds), 0, steps)
        passed = (by_hand.batches or 0) * rounds
        return Elapsed(None, passed, steps) if endless else Elapsed(passed // batches, passed % batches, steps)
    if plan.steps is None:
        epochs = plan.epochs_in(rounds)
        return Elapsed(epochs, 0, None if endless else accumulated.steps(epochs, batches))
    steps = plan.steps * rounds
    if endless:
        return Elapsed(None, steps * accumulated(0), steps)
    epochs, rest = accumulated.split(steps, batches)
    return Elapsed(epochs, rest * accumulated(epochs), steps)


class Accumulation:
    """How many batches an optimizer step takes in an epoch."""

    def __init__(self, trainer: Any) -> None:
        self._always = trainer.accumulate_grad_batches
        changing = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]
        self._changing = changing[-1] if changing else None

    @property
    def changes(self) -> bool:
        """Whether it is not the same in all epochs."""
        return self._changing is not None

    def __call__(self, epoch: int) -> int:
        return self._changing.get_accumulate_grad_batches(epoch) if self._changing else self._always

    def steps(self, epochs: int, batches: int) -> int:
        """Return the optimizer steps of some epochs."""
        if self._changing is None:
            return epochs * math.ceil(batches / self._always)
        return sum(math.ceil(batches / self(epoch)) for epoch in range(epochs))

    def split(self, steps: int, batches: int) -> tuple[int, int]:
        """Return whole epochs, and the steps beyond."""
        if self._changing is None:
            return divmod(steps, math.ceil(batches / self._always))
        epoch = 0
        while steps >= (taken := math.ceil(batches / self(epoch))):
            steps, epoch = steps - taken, epoch + 1
        return epoch, steps


def stand_after(trainer: Any, module: LightningModule, rounds: int, loader: Any) -> None:
    """Let an evaluation tell the time at the end of a round.

    Args:
        trainer: The trainer that evaluates.
        module: The module.
        rounds: The rounds that are over.
        loader: The client's train loader, which tells how many batches an epoch has if it is one with a length.
    """
    limit, plan = trainer.limit_train_batches, trainer.plan
    epoch = (rounds if plan.epochs is None else plan.epochs_in(rounds)) - 1
    length = sized_len(loader) if isinstance(loader, DataLoader) and module.automatic_optimization else None
    if plan.steps is not None:
        trainer.steps_before = plan.steps * rounds
    if length:
        trainer.fit_loop.max_batches = min(length, limit) if isinstance(limit, int) else int(length * limit)
        end = elapsed(trainer, plan, rounds)
        trainer.steps_before = end.steps
        epoch = (end.epochs or 0) + bool(end.batches) - 1
    start_at_epoch(trainer, epoch)


def start_at_epoch(trainer: Any, epoch: int) -> None:
    """Let ``current_epoch`` begin at a number."""
    for progress in (trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_progress.total):
        progress.ready = progress.started = progress.processed = progress.completed = epoch


def require_known(schedules: Iterable[tuple[Any, Pace]], end: Elapsed, batches: int | float) -> None:
    """Check that schedules count nothing that nobody knows.

    Args:
        schedules: Each with how often it is stepped.
        end: How far one long fit would be.
        batches: The batches of an epoch, infinity for a loader without length.

    Raises:
        ClientError: If one does.
    """
    for schedule, (interval, frequency) in schedules if batches == math.inf else ():
        name = type(schedule).__name__
        if interval == "step" and (end.epochs is not None or frequency != 1):
            raise ClientError(
                f"has a {name} that steps with each batch, on a loader without length: nothing tells how far the global"
                " round has taken it. Write FederatedTrainer(local_steps=...) or client_state='carry'."
            )
        if interval == "epoch" and end.epochs is None:
            raise ClientError(
                f"has a {name} that steps with each epoch, on a loader without length: nothing tells how many epochs"
                " local_steps= takes. Write FederatedTrainer(local_epochs=...) or client_state='carry'."
            )


class TrainerInARun(Trainer):
    """A trainer that trains for one round of a run, and tells the time of the run.

    Args:
        plan: How the run divides a client's training into rounds.
        rounds: The rounds before.
        log_dir: The server's; ``None`` for ``default_root_dir``.
        **kwargs: As ``Trainer``.

    Attributes:
        steps_before: The optimizer steps of all rounds before; ``None`` where nothing tells.
        was_asked: Whether the user's code asked for ``global_step`` where nothing tells how many there were before.
        find_steps: Finds ``steps_before`` when the user's code first asks; ``None`` where they are known.
    """

    was_asked = False
    find_steps: Callable[[], None] | None = None

    def __init__(self, plan: Plan, rounds: int, log_dir: str | None, **kwargs: Any) -> None:
        self.plan, self._log_dir = plan, log_dir
        self.steps_before: int | None = (plan.steps or 0) * rounds
        super().__init__(**kwargs)

    @property
    def estimated_stepping_batches(self) -> int | float:
        """The optimizer steps that a schedule runs over: of one round where it begins anew each round, else of all."""
        plan = self.plan
        epochs, steps = (plan.epochs or -1, plan.steps or -1) if plan.anew else plan.limits()
        if epochs == -1:
            return steps if steps != -1 else float("inf")
        run, self.fit_loop.max_epochs = self.fit_loop.max_epochs, epochs
        try:
            return super().estimated_stepping_batches
        finally:
            self.fit_loop.max_epochs = run

    @property
    def max_steps(self) -> int:
        """The optimizer steps of the whole run, as ``max_epochs`` are its epochs; -1 where steps do not limit it."""
        return self.plan.limits()[1]

    @property
    def global_step(self) -> int:
        """The client's optimizer steps, which count on from round to round as ``current_epoch`` does."""
        if self.find_steps is not None:
            find, self.find_steps = self.find_steps, None
            find()
        if self.steps_before is None:
            self.was_asked = True
        return (self.steps_before or 0) + self.fit_loop.epoch_loop.global_step

    @property
    def log_dir(self) -> str | None:
        """The server's: a client's trainer has no logger of its own."""
        return self._log_dir or self.default_root_dir
