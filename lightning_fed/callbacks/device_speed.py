"""Devices of different speed, and the virtual time that rounds take with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_fed import checks
from lightning_fed.callbacks.base import ClientReport, FederatedCallback, Stage
from lightning_fed.callbacks.by_client import ByClient, ByClientNumber
from lightning_fed.callbacks.planned_work import PlannedWork, Run, known_size
from lightning_fed.errors import ConfigurationError
from lightning_fed.values.weights import read, size_of

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer

Examples = Sequence[int] | Callable[[int], int]

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

    ``Deadline``, ``OverSelection``, ``FedBuff`` and ``FedAsync`` go by this clock.

    Both quantities are a number for all clients, a list with one for each, a distribution of ``torch.distributions``,
    of which each client draws one, from the seed alone, or a function of a round (from 1) and a client.

    Args:
        seconds_per_example: What a forward pass takes for one example, in seconds, at least 0.
        bandwidth: Bytes a second, greater than 0; ``None`` if messages take no time.
        examples: The examples of an epoch of each client: a list, or a function of a client. By default those that it
            reports; callbacks that plan by the clock take those that a ``Partition`` deals out to it.
        every_round: Draw from distributions anew in every round, and not once for the run.
        batch_size: The examples of an optimizer step, which a run with ``local_steps`` cannot know otherwise: of all
            batches whose gradients it accumulates.
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
        examples: Examples | None = None,
        every_round: bool = False,
        batch_size: int | None = None,
        max_virtual_time: float | None = None,
    ) -> None:
        self._seconds = ByClientNumber("seconds_per_example", seconds_per_example, "at least 0")
        self._bandwidth = ByClientNumber("bandwidth", bandwidth, "greater than 0")
        faults = self._seconds.faults() + ([] if bandwidth is None else self._bandwidth.faults())
        faults += checks.switch_faults({"every_round": every_round})
        if isinstance(examples, str) or not (examples is None or callable(examples) or isinstance(examples, Sequence)):
            faults.append(f"examples={examples!r} must be a list of numbers, or a function of a client.")
        if batch_size is not None and not (checks.is_number(batch_size, whole=True) and batch_size > 0):
            faults.append(f"batch_size={batch_size!r} must be a whole number above 0.")
        if max_virtual_time is not None:
            faults += checks.positive_faults("max_virtual_time", max_virtual_time, "a number of seconds above 0")
        if faults:
            raise ConfigurationError(f"DeviceSpeed: {' '.join(faults)}")
        self.seconds_per_example, self.bandwidth = seconds_per_example, bandwidth
        self.every_round, self.batch_size, self.max_virtual_time = every_round, batch_size, max_virtual_time
        self.examples = examples
        # The clock after the last two rounds: a checkpoint may be of a round that did not get to its end.
        self._ends: dict[int, float] = {}
        self._duration = 0.0
        self._plan: PlannedWork | None = None
        self._planned_end: dict[int, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what is planned of a fit."""
        return {**self.__dict__, "_plan": None}

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
        return self._seconds_in(Run.of(trainer), round, client, num_examples, num_bytes)

    def _seconds_in(self, run: Run, round: int, client: int, num_examples: float, num_bytes: int) -> float:
        if (epochs := run.local.epochs_of(round)) is not None:
            examples = num_examples * epochs
        else:
            assert run.local.steps is not None
            assert self.batch_size is not None  # on_federation_start has looked
            examples = run.local.steps * self.batch_size
        if run.local.second_fit is not None:
            examples *= 2
        if run.local.pass_before is not None:
            examples += num_examples
        per_example = self._seconds.of(round, client, self._drawn_in(round), run.num_clients, run.seed)
        return _PASSES * examples * per_example + self._travels(run, round, client, num_bytes)

    def _travels(self, run: Run, round: int, client: int, num_bytes: int) -> float:
        if self.bandwidth is None:
            return 0.0
        return num_bytes / self._bandwidth.of(round, client, self._drawn_in(round), run.num_clients, run.seed)

    def _drawn_in(self, round: int) -> int:
        """Return the round for whose sake devices are drawn; 0 for the run."""
        return round if self.every_round else 0

    def plan(self, trainer: FederatedTrainer) -> None:
        """Look at what clients will do, so that ``planned`` can tell how long it takes.

        Raises:
            ConfigurationError: If nobody knows how many examples clients have before they train.
        """
        owners: Any = getattr(trainer, "owners")  # noqa: B009 - the server's trainer, which is above this layer
        examples = self._examples_of if self.examples is not None else partial(known_size, owners.partition)
        examples(0)
        shared = trainer.local_options.staying.shared(read(trainer.lightning_module, copy=False))
        num_bytes = 2 * size_of(shared)
        for method in owners.training().values():
            down: Mapping[str, Any] = method.tensors_to_client(trainer, trainer.current_round, 0)
            num_bytes += size_of(down, method.tensors_expected(down))
        asks = callable(self.seconds_per_example) or callable(self.bandwidth)
        varies = self.every_round or asks or isinstance(trainer.local_options.epochs, tuple)
        self._plan = PlannedWork(examples, num_bytes, Run.of(trainer), varies)
        if not varies and (owners.partition.knows_sizes if self.examples is None else not callable(self.examples)):
            for client in range(trainer.num_clients):
                with suppress(ConfigurationError):  # of a client that may never train
                    self.planned(1, client)

    @property
    def is_planned(self) -> bool:
        """Whether ``plan`` has been called in this fit."""
        return self._plan is not None

    def planned(self, round: int, client: int) -> float:
        """Return how long a client will take for its part of a round, in seconds.

        Raises:
            ConfigurationError: If ``plan`` has not been called in this fit, or nobody knows the client's examples.
        """
        if (plan := self._plan) is None:
            raise ConfigurationError(
                f"DeviceSpeed.planned({round}, {client}) is known once plan(trainer) has been called in a fit: a"
                " callback that goes by the clock does that, and yours can from on_round_start on."
            )
        if (seconds := plan.seconds.get(client)) is None:
            seconds = self._seconds_in(plan.run, round, client, plan.examples(client), plan.num_bytes)
            if not plan.varies:
                plan.seconds[client] = seconds
        return seconds

    def planned_to_travel(self, round: int, client: int) -> float:
        """Return how much of that its messages take, in seconds."""
        assert self._plan is not None
        return self._travels(self._plan.run, round, client, self._plan.num_bytes)

    def ends(self, round: int, end: float) -> None:
        """Let a round be over at a virtual time, whatever its clients took."""
        self._planned_end = {round: end}

    def ends_by(self, round: int, end: float) -> None:
        """Let a round be over with its slowest client, who is there by then, if it was to be over later."""
        if end <= self._planned_end.get(round, end):
            self._planned_end = {}

    def _examples_of(self, client: int) -> int:
        given: Any = self.examples
        number = given(client) if callable(given) else given[client]
        if not checks.is_number(number, whole=True) or number < 0:
            raise ConfigurationError(
                f"DeviceSpeed: examples is {checks.as_typed(number)} for client {client}: it must be a whole number, at"
                " least 0."
            )
        return int(number)

    def _require_as_planned(self, report: ClientReport, travels: int) -> None:
        """Say once if a client did something else than it was planned with."""
        assert self._plan is not None
        examples = self._plan.examples(report.client)
        if report.num_examples == examples and (self.bandwidth is None or travels == self._plan.num_bytes):
            return
        rank_zero_warn(
            f"DeviceSpeed: client {report.client} trained on {report.num_examples:g} examples and {travels} bytes"
            f" travelled; what is planned by the clock goes by {examples} and {self._plan.num_bytes}. Write"
            " DeviceSpeed(..., examples=...) for as many as its loader yields in an epoch (drop_last, a sampler,"
            " limit_train_batches). Of other clients nothing is said."
        )
        self._plan.is_told = True

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Check that the examples of a round can be known."""
        if trainer.local_options.steps is not None and self.batch_size is None:
            raise ConfigurationError(
                "DeviceSpeed: with local_steps a client's time depends on the examples of a step: write"
                " DeviceSpeed(..., batch_size=...)."
            )
        if isinstance(self.examples, Sequence) and len(self.examples) != trainer.num_clients:
            raise ConfigurationError(
                f"DeviceSpeed: examples= has {len(self.examples)} numbers, and there are {trainer.num_clients} clients:"
                " write one for each."
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier fit has planned."""
        self._plan, self._planned_end = None, {}

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
        if stage != "train":
            return
        travels = report.bytes_down + report.bytes_up
        if self._plan is not None and not self._plan.is_told:
            self._require_as_planned(report, travels)
        examples = report.num_examples if self.examples is None else self._examples_of(report.client)
        self._duration = max(self._duration, self.seconds(trainer, round, report.client, examples, travels))

    def on_round_end(self, trainer: FederatedTrainer, round: int, metrics: dict[str, float]) -> None:
        """Log the time at which the round is over."""
        end = self._planned_end.get(round, self.now + self._duration)
        self._ends = {round - 1: self.now, round: max(self.now, end)}
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
