"""Participation: which clients train, and which evaluate, in each round."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning_fed import checks
from lightning_fed.callbacks.availability import Available, require_there, table_of, who_is_there
from lightning_fed.callbacks.base import CohortOwner, Stage
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import seed_for
from lightning_fed.values import by_round
from lightning_fed.values.by_round import ByRound

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer

_RULES = {"train": "in (0, 1]", "evaluate": "in [0, 1]"}


class PartialParticipation(CohortOwner):
    """Samples the cohort of each round, without replacement and from ``(seed, round)`` alone.

    A stage's cohort has ``fraction * n`` clients, rounded to the nearest whole number (halves up), at least ``min_*``
    and at least 1. (Flower rounds down, and its minimum of 2 overrides small fractions silently.) Where fewer than that
    are available, these are the cohort, and fewer than ``min_*`` are an error.

    Args:
        fraction_train: The part of the clients that trains, in ``(0, 1]``; a list with one for each round, of which the
            last goes on, or a function of the round (from 1).
        fraction_evaluate: The part that evaluates the new weights, in ``[0, 1]``, likewise; 0 for none.
        min_train_clients: At least so many train.
        min_evaluate_clients: At least so many evaluate, unless ``fraction_evaluate`` is 0.
        min_available_clients: The run does not start with fewer clients than this.
        weights: How likely each client is to train: ``"examples"``, by its training examples, or a list with one number
            for each client. Clients are drawn one after the other, each with a probability proportional to its weight
            among those that are left; weight 0 is never drawn. Who evaluates is drawn without weights.
        available: Which clients are there: a function of a round and a client that gives ``True`` or ``False``, or a
            table of them with a row for each round, which begins again after the last, and a column for each client.

    Raises:
        ConfigurationError: If an argument is out of its range.

    >>> PartialParticipation(fraction_train=0.29).size("train", 100)
    29
    >>> PartialParticipation(fraction_train=0.5).sample("train", round=1, num_clients=10, seed=0)
    [2, 6, 7, 8, 9]
    >>> nights = PartialParticipation(available=lambda round, client: (client < 5) == (round % 2 == 0))
    >>> nights.sample("train", round=1, num_clients=10, seed=0)
    [5, 6, 7, 8, 9]
    """

    def __init__(
        self,
        fraction_train: ByRound = 1.0,
        fraction_evaluate: ByRound = 1.0,
        min_train_clients: int = 1,
        min_evaluate_clients: int = 1,
        min_available_clients: int = 1,
        weights: Literal["examples"] | Sequence[float] | None = None,
        available: Available | None = None,
    ) -> None:
        minimums = {
            "min_train_clients": min_train_clients,
            "min_evaluate_clients": min_evaluate_clients,
            "min_available_clients": min_available_clients,
        }
        faults = [
            f"{name}={value!r} must be at least 1"
            for name, value in minimums.items()
            if not (checks.is_number(value, whole=True) and value >= 1)
        ]
        faults += by_round.faults("fraction_train", fraction_train, _is_fraction("train"), _RULES["train"])
        faults += by_round.faults("fraction_evaluate", fraction_evaluate, _is_fraction("evaluate"), _RULES["evaluate"])
        numbers: Any = weights
        if hasattr(numbers, "tolist"):  # an array or a tensor
            numbers = numbers.tolist()
        faults += _weights_faults(numbers)
        self.available, no_table = table_of(available)
        if faults := faults + no_table:
            raise ConfigurationError(f"PartialParticipation: {'; '.join(faults)}.")
        self.fraction_train, self.fraction_evaluate = fraction_train, fraction_evaluate
        self.min_train_clients, self.min_evaluate_clients = min_train_clients, min_evaluate_clients
        self.min_available_clients = min_available_clients
        self.weights: Literal["examples"] | Sequence[float] | None = numbers
        self._sizes: list[int] | None = None

    @property
    def varies(self) -> bool:
        """See ``CohortOwner``."""
        return self.available is not None or any(map(by_round.changes, (self.fraction_train, self.fraction_evaluate)))

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Ask how many examples clients have, where these are the weights.

        Raises:
            ConfigurationError: If nobody knows before they train.
        """
        if self.weights != "examples":
            return
        owners: Any = getattr(trainer, "owners")  # noqa: B009 - the server's trainer, which is above this layer
        self._sizes = owners.partition.sizes()
        if self._sizes is None:
            raise ConfigurationError(
                f"PartialParticipation(weights='examples'): {type(owners.partition).__name__} does not tell how many"
                " examples clients have before they train. Write the weights: weights=[120, 80, ...]."
            )

    def size(self, stage: Stage, num_clients: int, round: int = 1) -> int:
        """Return how many of ``num_clients`` take part in a stage of a round, where as many are available.

        Raises:
            ConfigurationError: If there are fewer clients than a minimum asks for, or what was given by round or client
                does not fit.
        """
        least, name = self._least(stage)
        given = self.fraction_train if stage == "train" else self.fraction_evaluate
        call = f"PartialParticipation(fraction_{stage}=...)"
        fraction = by_round.at(call, given, round, _is_fraction(stage), _RULES[stage])
        if isinstance(self.weights, Sequence) and self.weights != "examples" and len(self.weights) != num_clients:
            raise ConfigurationError(
                f"PartialParticipation(weights=...) has {len(self.weights)} entries for {num_clients} clients: write"
                " one for each."
            )
        if fraction == 0:
            return 0
        for minimum, argument in ((least, name), (self.min_available_clients, "min_available_clients")):
            if minimum > num_clients:
                raise ConfigurationError(
                    f"PartialParticipation({argument}={minimum}) asks for more clients than there are: {num_clients}."
                    f" Lower {argument}, or raise num_clients."
                )
        return max(1, least, math.floor(fraction * num_clients + 0.5 + 1e-9))

    def sample(self, stage: Stage, round: int, num_clients: int, seed: int) -> list[int]:
        """Return the cohort of a round: client indices, ascending.

        Raises:
            RoundError: If fewer clients are available than have to take part.
        """
        size = self.asked(stage, self.size(stage, num_clients, round))
        if not size:
            return []
        clients = who_is_there("PartialParticipation", self.available, round, num_clients)
        weights = self._weights() if stage == "train" else None
        if weights is not None:
            clients = [client for client in clients if weights[client] > 0]
        require_there(stage, round, len(clients), num_clients, self._least(stage))
        if size >= len(clients):
            return list(clients)
        draws = random.Random(seed_for(seed, f"cohort/{stage}", round=round))
        if weights is None:
            return sorted(draws.sample(clients, size))
        # The first to come of exponential times is one with a probability proportional to its rate, and so on.
        times = {client: draws.expovariate(1.0) / weights[client] for client in clients}
        return sorted(sorted(clients, key=times.__getitem__)[:size])

    def asked(self, stage: Stage, size: int) -> int:
        """Return how many are asked in a stage where ``size`` are to take part."""
        return size

    def _least(self, stage: Stage) -> tuple[int, str]:
        """Return how many have to take part in a stage, and the argument that says so."""
        least = self.min_train_clients if stage == "train" else self.min_evaluate_clients
        return least, f"min_{stage}_clients"

    def _weights(self) -> Sequence[float] | None:
        if self.weights != "examples":
            return self.weights
        if self._sizes is None:
            raise ConfigurationError("PartialParticipation(weights='examples') is known once a fit has begun.")
        return self._sizes


def _is_fraction(stage: Stage) -> Any:
    return lambda number: (number > 0 if stage == "train" else number >= 0) and number <= 1


def _weights_faults(weights: Any) -> list[str]:
    if weights is None or (isinstance(weights, str) and weights == "examples"):
        return []
    rule = "must be 'examples', or a list with a number for each client, 0 or more, not all 0"
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        return [f"weights={weights!r} {rule}"]
    wrong = [i for i, one in enumerate(weights) if not (checks.is_number(one) and 0 <= one < math.inf)]
    if wrong or not any(weights):
        none = "weights=..., all 0," if weights else "weights=[]"
        which = f"weights=..., in which client {wrong[0]} has {weights[wrong[0]]!r}," if wrong else none
        return [f"{which} {rule}"]
    return []
