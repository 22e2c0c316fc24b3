"""Devices of different speed, and the virtual time that rounds take with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.distributions import Distribution

from lightning_fed import checks
from lightning_fed.callbacks.base import ClientReport, FederatedCallback, Stage
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import seed_for, seeded

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer

ByClient = float | Sequence[float] | Distribution | Callable[[int, int], float]

VIRTUAL_TIME = "time/virtual"
# A training step costs three times its forward pass: FedScale's form (Lai et al. 2022, fedscale/utils/compressor).
_PASSES = 3.0


class DeviceSpeed(FederatedCallback):
    """Gives clients devices, and the run a virtual clock: ``time/virtual``, the seconds that its rounds would take.

    A client takes ``3 * examples * seconds_per_example + bytes / bandwidth`` seconds for its part of a round (FedScale,
    Lai et al. 2022), with the examples of all its local epochs and the bytes that it is sent and sends. A second model
    (``Ditto``, ``APFL``) takes as long again, the pass of ``Scaffold(option="I")`` an epoch more; what a method adds to
    a step takes no time, and a fit that a client callback ends early counts as a whole one. A round lasts as long as
    its slowest client whose reply counts; evaluation takes no time. Nothing of the training changes: what it computes,
    and how long that takes here, is as without it.

    Both quantities are a number for all clients, a list with one for each, a distribution of ``torch.distributions``,
    of which each client draws one, from the seed alone, or a function of a round (from 1) and a client.

    Args:
        seconds_per_example: What a forward pass takes for one example, in seconds, at least 0.
        bandwidth: Bytes a second, greater than 0; ``None`` if messages take no time.
        every_round: Draw from distributions anew in every round, and not once for the run.
        batch_size: The examples of a step, which a run with ``local_steps`` cannot know otherwise.
        max_virtual_time: Stop after the round in which the clock gets there, in seconds.

    Raises:
        ConfigurationError: If an argument is out of its range.

    >>> from torch.distributions import HalfNormal
    >>> from lightning_fed import FederatedTrainer
    >>> phones = DeviceSpeed(HalfNormal(0.05), bandwidth=1e6)
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=100, callbacks=[phones])
    """

    def __init__(
        self,
        seconds_per_example: ByClient,
        bandwidth: ByClient | None = None,
        *,
        every_round: bool = False,
        batch_size: int | None = None,
        max_virtual_time: float | None = None,
    ) -> None:
        self._seconds = _Drawn("seconds_per_example", seconds_per_example, "at least 0")
        self._bandwidth = _Drawn("bandwidth", bandwidth, "greater than 0")
        faults = self._seconds.faults() + ([] if bandwidth is None else self._bandwidth.faults())
        faults += checks.switch_faults({"every_round": every_round})
        if batch_size is not None and not (checks.is_number(batch_size, whole=True) and batch_size > 0):
            faults.append(f"batch_size={batch_size!r} must be a whole number above 0.")
        if max_virtual_time is not None:
            faults += checks.positive_faults("max_virtual_time", max_virtual_time, "a number of seconds above 0")
        if faults:
            raise ConfigurationError(f"DeviceSpeed: {' '.join(faults)}")
        self.seconds_per_example, self.bandwidth = seconds_per_example, bandwidth
        self.every_round, self.batch_size, self.max_virtual_time = every_round, batch_size, max_virtual_time
        # The clock after the last two rounds: a checkpoint may be of a round that did not get to its end.
        self._ends: dict[int, float] = {}
        self._duration = 0.0

    @property
    def now(self) -> float:
        """The virtual seconds of the rounds that are over."""
        return max(self._ends.values(), default=0.0)

    def seconds(self, trainer: FederatedTrainer, round: int, client: int, num_examples: float, num_bytes: int) -> float:
        """Return how long a client takes for its part of a round.

        Args:
            trainer: The server's trainer.
            round: The round, from 1.
            client: The client's index.
            num_examples: The examples of one of its epochs.
            num_bytes: What it is sent and sends.
        """
        local, given = trainer.local_options, (round if self.every_round else 0)
        if (epochs := local.epochs_of(round)) is not None:
            examples = num_examples * epochs
        else:
            assert local.steps is not None
            assert self.batch_size is not None  # on_federation_start has looked
            examples = local.steps * self.batch_size
        if local.second_fit is not None:
            examples *= 2
        if local.pass_before is not None:
            examples += num_examples
        run = (trainer.num_clients, trainer.seed)
        computes = _PASSES * examples * self._seconds.of(round, client, given, *run)
        if self.bandwidth is None:
            return float(computes)
        return float(computes + num_bytes / self._bandwidth.of(round, client, given, *run))

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Check that the examples of a round are known."""
        if trainer.local_options.steps is not None and self.batch_size is None:
            raise ConfigurationError(
                "DeviceSpeed: with local_steps a client's time depends on the examples of a step: write"
                " DeviceSpeed(..., batch_size=...)."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the clock to where the run is: 0 for a new one; a run that is beyond ``max_virtual_time`` is over."""
        self._ends = {round: end for round, end in self._ends.items() if round <= trainer.global_step}
        self._stop_in_time(trainer)

    def on_round_start(self, trainer: FederatedTrainer, round: int, stage: Stage, cohort: Sequence[int]) -> None:
        """Begin to time a round."""
        if stage == "train":
            self._duration = 0.0

    def on_client_end(self, trainer: FederatedTrainer, round: int, stage: Stage, report: ClientReport) -> None:
        """Wait for a client."""
        if stage == "train":
            travels = report.bytes_down + report.bytes_up
            took = self.seconds(trainer, round, report.client, report.num_examples, travels)
            self._duration = max(self._duration, took)

    def on_round_end(self, trainer: FederatedTrainer, round: int, metrics: dict[str, float]) -> None:
        """Log the time at which the round is over."""
        self._ends = {round - 1: self.now, round: self.now + self._duration}
        metrics[VIRTUAL_TIME] = self.now
        self._stop_in_time(trainer)

    def _stop_in_time(self, trainer: Trainer) -> None:
        if self.max_virtual_time is not None and self.now >= self.max_virtual_time:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return the clock."""
        return {"ends": dict(self._ends)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the clock back."""
        self._ends = dict(state_dict["ends"])


class _Drawn:
    """A number of each client, wherever it comes from."""

    def __init__(self, name: str, given: Any, rule: Literal["at least 0", "greater than 0"]) -> None:
        self._name, self._given, self._rule = name, given, rule
        self._numbers: tuple[tuple[int, int, int], list[float]] | None = None

    def faults(self) -> list[str]:
        """Return a sentence if what was given cannot be used; what is drawn, or a function gives, only a run tells."""
        given = self._given
        if callable(given) or (isinstance(given, Distribution) and given.batch_shape == given.event_shape == ()):
            return []
        numbers = given if isinstance(given, Sequence) and not isinstance(given, str) and given else [given]
        if all(map(self._is_good, numbers)):
            return []
        return [
            f"{self._name}={given!r} must be {self._rule}: a number, a list with one for each client, a"
            " distribution of torch.distributions of a single number, or a function of a round and a client."
        ]

    def of(self, round: int, client: int, drawn_in: int, clients: int, seed: int) -> float:
        """Return the number of a client.

        Args:
            round: The round, for a function.
            client: The client.
            drawn_in: The round for whose sake distributions are drawn from; 0 for the run.
            clients: How many clients there are.
            seed: The run's seed.

        Raises:
            ConfigurationError: If it is out of its range, or a list has not one for each client.
        """
        given = self._given
        if callable(given):
            number = given(round, client)
        elif isinstance(given, Distribution):
            number = self._draw(drawn_in, clients, seed)[client]
        elif not isinstance(given, Sequence):
            return float(given)
        elif len(given) != clients:
            raise ConfigurationError(
                f"DeviceSpeed: {self._name}= has {len(given)} numbers, and there are {clients} clients: write one for"
                " each."
            )
        else:
            return float(given[client])
        if not self._is_good(number):
            raise ConfigurationError(
                f"DeviceSpeed: {self._name} is {checks.as_typed(number)} for client {client} in round {round}: it must"
                f" be {self._rule}."
            )
        return float(number)

    def _is_good(self, number: object) -> bool:
        least = 0.0 if self._rule == "at least 0" else math.ulp(0.0)
        return checks.is_number(number) and least <= number < math.inf

    def _draw(self, round: int, clients: int, seed: int) -> list[float]:
        key = (round, clients, seed)
        if self._numbers is None or self._numbers[0] != key:
            with seeded(seed_for(seed, f"device/{self._name}", round=round)):
                drawn: torch.Tensor = self._given.sample((clients,))
            self._numbers = (key, drawn.tolist())
        return self._numbers[1]
