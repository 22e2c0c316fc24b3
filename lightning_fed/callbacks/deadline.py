"""Rounds with a deadline, by the virtual clock or in real seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_fed import checks
from lightning_fed.callbacks.base import ClientReport, Stage
from lightning_fed.callbacks.by_clock import GoesByClock, is_simulation
from lightning_fed.client.local.method import LocalMethod
from lightning_fed.errors import ClientError, ConfigurationError, RoundError

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer


class Deadline(GoesByClock):
    """Leaves out the replies that take longer than a deadline: by the virtual clock of ``DeviceSpeed``, or in truth.

    In a simulation a client that would be late does not train. In a network (``engine=SuperLink(...)``) seconds are
    real ones, and who has not replied by then is late, which is no failure. What it keeps is as before the round. A
    round in which somebody is late lasts as long as the deadline; ``late/clients`` is logged, ``late`` tells who it was
    in the last round.

    Args:
        seconds: Seconds from the start of a round, > 0.
        min_clients: At least so many have to be in time.
        partial_work: In a simulation: a client that is too slow trains as many steps as it has time for, at least one,
            and is in time; only who cannot even be sent the weights and send them back is late. Its averaging
            coefficient stays that of all its examples; ``FedNova`` divides updates by the steps that were made. Its
            schedules go on as if it had made all; with ``client_state="carry"`` from where it stopped, those by epochs
            only after a whole one.

    Raises:
        ConfigurationError: If an argument is out of its range.

    >>> from lightning_fed import FederatedTrainer
    >>> from lightning_fed.callbacks import DeviceSpeed
    >>> callbacks = [DeviceSpeed([0.1, 0.2, 0.9]), Deadline(60)]
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=callbacks)
    """

    def __init__(self, seconds: float, min_clients: int = 1, partial_work: bool = False) -> None:
        super().__init__()
        faults = checks.positive_faults("seconds", seconds, "a number of seconds above 0")
        faults += checks.switch_faults({"partial_work": partial_work})
        if not (checks.is_number(min_clients, whole=True) and min_clients >= 1):
            faults.append(f"min_clients={min_clients!r} must be a whole number of at least 1.")
        if faults:
            raise ConfigurationError(f"Deadline: {' '.join(faults)}")
        self.seconds, self.min_clients, self.partial_work = seconds, min_clients, partial_work
        self._parts: dict[int, float] = {}
        self._is_simulation, self._asked = True, 0

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Check that there is a clock, and that a part of a client's work can be told."""
        self._is_simulation = is_simulation(trainer)
        if self._is_simulation:
            super().on_federation_start(trainer)
        elif self.partial_work:
            raise ConfigurationError(
                "Deadline(partial_work=True) goes by a virtual clock, and clients of a network take their own time."
                " Leave partial_work out."
            )
        local = trainer.local_options
        if self.partial_work and (local.second_fit is not None or local.pass_before is not None):
            more = "train a second model" if local.second_fit is not None else "pass over their data before they train"
            raise ConfigurationError(
                f"Deadline(partial_work=True) ends a client's fit early, and a method in the run lets clients {more},"
                " which it does not end. Leave partial_work out."
            )

    def in_time(self, trainer: FederatedTrainer, round: int, cohort: Sequence[int]) -> Sequence[int]:
        """Return those who meet the deadline.

        Raises:
            RoundError: If they are too few.
        """
        if not self._is_simulation:
            return cohort
        clock = self.clock(trainer)
        took = {client: clock.planned(round, client) for client in cohort}
        self._parts = {client: self._part(took[client], clock.planned_to_travel(round, client)) for client in cohort}
        least = 0.0 if self.partial_work else 1.0
        self.late = {client: took[client] for client, part in self._parts.items() if part <= 0 or part < least}
        left = [client for client in cohort if client not in self.late]
        if len(left) < self.min_clients:
            raise RoundError(self._too_few(round, len(left), took), round=round, stage="train")
        if any(seconds > self.seconds for seconds in took.values()):
            clock.ends(round, clock.now + self.seconds)
        return left

    def seconds_to_wait(self, trainer: FederatedTrainer, round: int) -> float | None:
        """Return the deadline, where it is one of real seconds."""
        return None if self._is_simulation else self.seconds

    def on_round_start(self, trainer: FederatedTrainer, round: int, stage: Stage, cohort: Sequence[int]) -> None:
        """Wait for replies, where they come from a network."""
        if stage == "train" and not self._is_simulation:
            self.late, self._asked = dict.fromkeys(cohort, math.inf), len(cohort)

    def on_client_end(self, trainer: FederatedTrainer, round: int, stage: Stage, report: ClientReport) -> None:
        """Note that a client is not late."""
        if stage == "train":
            self.late.pop(report.client, None)

    def on_client_error(self, trainer: FederatedTrainer, round: int, stage: Stage, error: ClientError) -> None:
        """Note that a client has failed, and is not late."""
        if stage == "train" and error.client is not None:
            self.late.pop(error.client, None)

    def on_round_end(self, trainer: FederatedTrainer, round: int, metrics: dict[str, float]) -> None:
        """Log how many were late.

        Raises:
            RoundError: If in a network too few were in time.
        """
        super().on_round_end(trainer, round, metrics)
        if not self._is_simulation and (left := self._asked - len(self.late)) < self.min_clients:
            raise RoundError(
                f"Round {round}: {left} of {self._asked} clients replied within Deadline({self.seconds:g}), and"
                f" {self.min_clients} have to. Give them more time.",
                round=round,
                stage="train",
            )

    def _part(self, takes: float, travels: float) -> float:
        """Return which part of its steps a client has time for, at most 1."""
        return 1.0 if takes <= self.seconds else (self.seconds - travels) / (takes - travels or math.inf)

    def _too_few(self, round: int, left: int, took: Mapping[int, float]) -> str:
        if self.min_clients > len(took):
            return (
                f"Round {round}: Deadline({self.seconds:g}, min_clients={self.min_clients}) asks for more clients than"
                f" take part: {len(took)}. Lower min_clients, or let more take part."
            )
        fastest = min(took, key=took.__getitem__)
        or_else = "" if self.partial_work else ", or let them do what they can, partial_work=True"
        return (
            f"Round {round}: {left} of {len(took)} clients meet Deadline({self.seconds:g}), and {self.min_clients} have"
            f" to. The fastest, client {fastest}, takes {took[fastest]:.3g} s, half of them"
            f" {median(took.values()):.3g} s or more. Give them more time{or_else}."
        )

    @property
    def has_local_part(self) -> bool:
        """Only partial work has one: a site need not know of a deadline."""
        return self.partial_work

    def local_callbacks(self) -> Sequence[Callback]:
        """Return what ends a client's fit early."""
        return [PartialWork()]

    def tensors_to_client(self, trainer: FederatedTrainer, round: int, client: int) -> Mapping[str, Tensor]:
        """Return the part of its steps that a client has time for, a float64 scalar."""
        return {"part": torch.tensor(self._parts.get(client, 1.0), dtype=torch.float64)}

    def tensors_expected(self, sent: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return nothing: nothing comes back."""
        return {}


class PartialWork(LocalMethod):
    """The client's part of ``Deadline(partial_work=True)``: ends a fit after a part of its optimizer steps."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what there is time for: batches, or with ``local_steps`` optimizer steps.

        Raises:
            ClientError: If nothing tells how many batches there are.
        """
        plan = getattr(trainer, "plan")  # noqa: B009 - of a client's trainer
        self._counts_steps, self._done, self._begin = plan.steps is not None, 0, trainer.global_step
        all_of_it = plan.steps if self._counts_steps else plan.epochs * trainer.num_training_batches
        part = float(self.received["part"])
        if part < 1 and math.isinf(all_of_it):
            raise ClientError(
                "trains on a loader without length, of whose batches Deadline(partial_work=True) cannot tell a part."
                " Give the loader a length, or write FederatedTrainer(local_steps=...)."
            )
        self._most = math.inf if part >= 1 else max(1, math.floor(part * all_of_it + 1e-9))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the fit when the time is over; batches whose gradients are accumulated stay together."""
        self._done = trainer.global_step - self._begin if self._counts_steps else self._done + 1
        every = 1 if self._counts_steps else trainer.accumulate_grad_batches
        is_stepped = (batch_idx + 1) % every == 0 or batch_idx + 1 == trainer.num_training_batches
        if is_stepped and self._done + every > self._most:
            trainer.should_stop = True
