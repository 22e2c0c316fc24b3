"""Partial participation: a part of the clients trains in each round."""

from __future__ import annotations

import math

from lightning_fed import checks
from lightning_fed.callbacks.base import CohortOwner, Stage
from lightning_fed.errors import ConfigurationError


class PartialParticipation(CohortOwner):
    """Samples the cohort of each round, without replacement and from ``(seed, round)`` alone.

    A stage's cohort has ``fraction * n`` clients, rounded to the nearest whole number (halves up), at least ``min_*``
    and at least 1. (Flower rounds down, and its minimum of 2 overrides small fractions silently.)

    Args:
        fraction_train: The part of the clients that trains, in ``(0, 1]``.
        fraction_evaluate: The part that evaluates the new weights, in ``[0, 1]``; 0 for none.
        min_train_clients: At least so many train.
        min_evaluate_clients: At least so many evaluate, unless ``fraction_evaluate`` is 0.
        min_available_clients: The run does not start with fewer clients than this.

    Raises:
        ConfigurationError: If a fraction or minimum is out of its range.

    >>> PartialParticipation(fraction_train=0.29).size("train", 100)
    29
    >>> PartialParticipation(fraction_train=0.5).sample("train", round=1, num_clients=10, seed=0)
    [2, 6, 7, 8, 9]
    """

    def __init__(
        self,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_clients: int = 1,
        min_evaluate_clients: int = 1,
        min_available_clients: int = 1,
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
        if not (checks.is_number(fraction_train) and 0 < fraction_train <= 1):
            faults.append(f"fraction_train={fraction_train!r} must be in (0, 1]")
        if not (checks.is_number(fraction_evaluate) and 0 <= fraction_evaluate <= 1):
            faults.append(f"fraction_evaluate={fraction_evaluate!r} must be in [0, 1]")
        if faults:
            raise ConfigurationError(f"PartialParticipation: {'; '.join(faults)}.")
        self.fraction_train, self.fraction_evaluate = fraction_train, fraction_evaluate
        self.min_train_clients, self.min_evaluate_clients = min_train_clients, min_evaluate_clients
        self.min_available_clients = min_available_clients

    def size(self, stage: Stage, num_clients: int) -> int:
        """Return how many of ``num_clients`` take part in a stage.

        Raises:
            ConfigurationError: If there are fewer clients than a minimum asks for.
        """
        fraction, least, name = (
            (self.fraction_train, self.min_train_clients, "min_train_clients")
            if stage == "train"
            else (self.fraction_evaluate, self.min_evaluate_clients, "min_evaluate_clients")
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
