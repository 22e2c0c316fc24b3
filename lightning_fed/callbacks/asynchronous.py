"""Asynchronous training: clients train all the time, and the server takes replies as they arrive."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_fed import checks
from lightning_fed.callbacks.base import Averaging, CohortOwner, FederatedCallback, Stage
from lightning_fed.callbacks.by_clock import clock_of
from lightning_fed.callbacks.device_speed import DeviceSpeed
from lightning_fed.callbacks.fedavg import FedAvg
from lightning_fed.callbacks.flights import Flight, Flights, Schedule, Update
from lightning_fed.callbacks.participation import PartialParticipation
from lightning_fed.errors import ConfigurationError
from lightning_fed.strategies import AdagradMean, AdamMean, MomentumMean, WeightedMean, YogiMean
from lightning_fed.values.weights import Weights, parameter_names
from lightning_fed.views import overrides

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer

Discount = float | Callable[[int], float]
# They move the global weights by what clients changed; others compare replies, or send weights of their own.
_STRATEGIES = (WeightedMean, MomentumMean, AdagradMean, AdamMean, YogiMean)


class Asynchronous(CohortOwner):
    """The base of asynchronous methods. A round is one server update, made of the replies that arrive first.

    When a client trains decides nothing but which weights it begins with; so those that fill the next buffer are one
    ordinary round, in which each is sent the version that was current when it began. Who that is follows from the
    clock of ``DeviceSpeed`` alone.

    Args:
        concurrency: How many clients are at work at once.
        buffer_size: How many replies an update takes.
        discount: What a reply counts of which ``tau`` updates were made while the client worked: ``(1 + tau) ** -a``
            for a number ``a``, 0 for no discount; or a function of ``tau`` that gives a number in ``[0, 1]``.
        max_staleness: Replies with a greater ``tau`` are dropped.
        fraction_evaluate: As in ``PartialParticipation``.

    Attributes:
        update: The present server update: who arrives, who is at work then.
    """

    def __init__(
        self,
        concurrency: int,
        buffer_size: int,
        discount: Discount,
        max_staleness: int | None,
        fraction_evaluate: float,
    ) -> None:
        whole = {"concurrency": concurrency, "buffer_size": buffer_size}
        faults = [
            f"{name}={value!r} must be a whole number of at least 1."
            for name, value in whole.items()
            if not (checks.is_number(value, whole=True) and value >= 1)
        ]
        if not faults and buffer_size > concurrency:
            faults = [
                f"buffer_size={buffer_size} is more than concurrency={concurrency}: so many replies are never on their"
                " way."
            ]
        if not callable(discount) and not (checks.is_number(discount) and 0 <= discount < float("inf")):
            faults.append(f"discount={discount!r} must be an exponent, at least 0, or a function of the staleness.")
        if max_staleness is not None and not (checks.is_number(max_staleness, whole=True) and max_staleness >= 0):
            faults.append(f"max_staleness={max_staleness!r} must be a whole number of at least 0, or None.")
        if faults:
            raise ConfigurationError(f"{type(self).__name__}: {' '.join(faults)}")
        self.concurrency, self.buffer_size, self.discount = int(concurrency), int(buffer_size), discount
        self.max_staleness = max_staleness
        try:
            self._evaluates = PartialParticipation(fraction_evaluate=fraction_evaluate)
        except ConfigurationError as error:
            raise ConfigurationError(str(error).replace("PartialParticipation", type(self).__name__)) from None
        self.update = Update(Flights())
        self._arrived: dict[int, Flight] = {}
        # After the last two rounds: a checkpoint may be of a round that did not get to its end.
        self._after: dict[int, Flights] = {}
        self._versions: dict[int, Weights] = {}
        self._moving: frozenset[str] = frozenset()
        self._clock: DeviceSpeed | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the clock, which is another callback of the run: a fit finds it when it starts."""
        return {**self.__dict__, "_clock": None}

    # ------------------------------------------------------------------------------------------------- who takes part

    def size(self, stage: Stage, num_clients: int) -> int:
        """Return how many clients take part in a stage.

        Raises:
            ConfigurationError: If there are fewer clients than are at work at once.
        """
        if self.concurrency > num_clients:
            raise ConfigurationError(
                f"{type(self).__name__}(concurrency={self.concurrency}) lets more clients train at once than there are:"
                f" {num_clients}."
            )
        return self.buffer_size if stage == "train" else self._evaluates.size(stage, num_clients)

    def sample(self, stage: Stage, round: int, num_clients: int, seed: int) -> list[int]:
        """Return who fills the next buffer, ascending; who evaluates is drawn as in ``PartialParticipation``."""
        if stage != "train":
            return self._evaluates.sample(stage, round, num_clients, seed)
        assert self._clock is not None  # on_federation_start has found it
        limits = self.concurrency, self.buffer_size, self.max_staleness
        before = self._after.get(round - 1, Flights(self._clock.now))
        self.update = Schedule(*limits, num_clients, seed, self._clock.planned).next_update(before, round - 1)
        self._arrived = {flight.client: flight for flight in self.update.arrived}
        self._after = {round - 1: before, round: self.update.after}
        return sorted(self._arrived)

    def staleness(self, flight: Flight, round: int) -> int:
        """Return how many updates were made while a client worked whose reply is in a round's."""
        return round - 1 - flight.version

    # ---------------------------------------------------------------------------------------------------- the weights

    def weights_to_client(self, round: int, weights: Weights) -> Mapping[int, Weights]:
        """Return the older versions, for those who began with one."""
        needed = {round - 1} | {version for after in self._after.values() for version in after.versions}
        known = {v: kept for v, kept in {**self._versions, round - 1: weights}.items() if v in needed}
        # Those of a checkpoint have what travelled in its run; a tensor that did not then is as it is now.
        self._versions = {v: {name: kept.get(name, now) for name, now in weights.items()} for v, kept in known.items()}
        stale = {client: flight.version for client, flight in self._arrived.items() if flight.version != round - 1}
        return {client: self._versions[version] for client, version in stale.items()}

    def contribution(self, round: int, client: int, trained: Weights, weights: Weights) -> Weights:
        """Return where the global weights would be if this client's reply was all there is."""
        flight = self._arrived[client]
        staleness = self.staleness(flight, round)
        return self.moved(trained, self._versions[flight.version], weights, staleness, self._discount(staleness))

    @abstractmethod
    def moved(self, trained: Weights, begin: Weights, weights: Weights, staleness: int, discount: float) -> Weights:
        """Return where a client would take the global weights, each tensor as it is or in float64 or complex128.

        Args:
            trained: What it has sent.
            begin: What it began with.
            weights: The global weights.
            staleness: The updates between the two.
            discount: What it counts, in ``[0, 1]``.
        """

    def _discount(self, staleness: int) -> float:
        if not callable(self.discount):
            return float((1 + staleness) ** -self.discount)
        number = self.discount(staleness)
        if not (checks.is_number(number) and 0 <= number <= 1):
            raise ConfigurationError(
                f"{type(self).__name__}(discount=...) gave {checks.as_typed(number)} for a staleness of {staleness}: it"
                " must be a number in [0, 1]."
            )
        return float(number)

    # ------------------------------------------------------------------------------------------------- what fits to it

    def aggregation(self) -> Averaging:
        """Return the aggregation where no callback decides it: all replies of a buffer weigh alike."""
        return FedAvg(weighting="uniform")

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Find the clock, and check that nothing goes by rounds in which all begin with the same weights.

        Raises:
            ConfigurationError: If something does.
        """
        who = type(self).__name__
        self._clock, owners = clock_of(trainer, who), getattr(trainer, "owners")  # noqa: B009
        federation: Any = getattr(trainer, "federation")  # noqa: B009 - of the server, which is above this layer
        strategy = federation.session.rounds.strategy  # as all callbacks have left it
        if type(strategy) not in _STRATEGIES:
            raise ConfigurationError(
                f"{who}: {getattr(strategy, 'name', type(strategy).__name__)} compares replies of one version of the"
                " weights, or sends weights of its own, and here clients begin with different versions. Leave it out,"
                " or write FedAvgM, FedAdam, FedAdagrad or FedYogi for a server optimizer."
            )
        self._refuse_those_of_one_round(owners)
        if isinstance(trainer.local_options.epochs, tuple):
            raise ConfigurationError(
                f"{who}: local_epochs= changes from round to round, and a client that begins now does not know in which"
                " update its reply will be. Write one number."
            )
        self._moving = parameter_names(trainer.lightning_module)
        self._clock.plan(trainer)

    def _refuse_those_of_one_round(self, owners: Any) -> None:
        """Refuse methods that go by a round's own weights, or by who is asked in it."""
        hooks = ("tensors_to_client", "tensors_from_client")
        for method in owners.callbacks:
            if overrides(method, FederatedCallback, "in_time"):
                raise ConfigurationError(
                    f"{type(self).__name__}: {type(method).__name__} leaves clients out of a round, and here a round is"
                    " made of those who arrive. Leave one of the two out; max_staleness= drops who takes too long."
                )
        for name, method in owners.training().items():
            if any(overrides(method, FederatedCallback, hook) for hook in hooks):
                raise ConfigurationError(
                    f"{type(self).__name__}: {name} sends tensors of a round with the round's weights, and here clients"
                    " begin with different versions of these. Leave one of the two out."
                )

    # -------------------------------------------------------------------------------------------------- what is logged

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of what an earlier fit has left: those at work began with weights of its module."""
        if stage == "fit":
            self._after, self._versions = {}, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from where the run is: nobody is at work in a new one, nor who is not in this one."""
        clients: int = getattr(trainer, "num_clients")  # noqa: B009 - of the server's trainer, which is above this layer
        self._after = {
            round: after.among(clients) for round, after in self._after.items() if round <= trainer.global_step
        }

    def on_round_start(self, trainer: FederatedTrainer, round: int, stage: Stage, cohort: Sequence[int]) -> None:
        """Set the clock to when the buffer is full."""
        if stage == "train" and self._clock is not None:
            self._clock.ends(round, self.update.after.now)

    def on_round_end(self, trainer: FederatedTrainer, round: int, metrics: dict[str, float]) -> None:
        """Log how old the weights were with which clients began, and how many versions are at work."""
        stale = [self.staleness(flight, round) for flight in self.update.arrived]
        metrics["staleness/mean"], metrics["staleness/max"] = sum(stale) / len(stale), float(max(stale))
        metrics["versions/live"] = float(len(self.update.after.versions))
        if self.max_staleness is not None:
            metrics["staleness/dropped"] = float(len(self.update.dropped))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Let go of what only the round before needed, as a run goes on after this one now."""
        self._after = {round: after for round, after in self._after.items() if round == trainer.global_step}
        needed = {version for after in self._after.values() for version in after.versions}
        self._versions = {version: kept for version, kept in self._versions.items() if version in needed}

    def state_dict(self) -> dict[str, Any]:
        """Return who is at work, and the versions of the weights with which they began."""
        rounds = {
            round: [after.now, after.started, [list(flight) for flight in after.flying]]
            for round, after in self._after.items()
        }
        return {"rounds": rounds, "versions": {version: dict(kept) for version, kept in self._versions.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self._after = {
            round: Flights.of(now, started, (Flight(*flight) for flight in flying))
            for round, (now, started, flying) in state_dict["rounds"].items()
        }
        self._versions = {version: dict(kept) for version, kept in state_dict["versions"].items()}


def wide(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor in float64, or complex128, on a device."""
    return tensor.to(device=device, dtype=torch.complex128 if tensor.is_complex() else torch.float64)
