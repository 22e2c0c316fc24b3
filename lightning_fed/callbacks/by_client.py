"""A number of each client: the same for all, a list, a distribution to draw from, or a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.distributions import Distribution

from lightning_fed import checks
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import seed_for, seeded

ByClient = float | Sequence[float] | Distribution | Callable[[int, int], float]


class ByClientNumber:
    """A number of each client, wherever it comes from."""

    def __init__(self, name: str, given: Any, rule: Literal["at least 0", "greater than 0"]) -> None:
        self._name, self._given, self._rule = name, given, rule
        self._least = 0.0 if rule == "at least 0" else math.ulp(0.0)
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
        if isinstance(given, Distribution):
            number = self._draw(drawn_in, clients, seed)[client]
            if self._least <= number < math.inf:
                return number
        elif callable(given):
            number = given(round, client)
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
        return checks.is_number(number) and self._least <= number < math.inf

    def _draw(self, round: int, clients: int, seed: int) -> list[float]:
        key = (round, clients, seed)
        if self._numbers is None or self._numbers[0] != key:
            with seeded(seed_for(seed, f"device/{self._name}", round=round)):
                drawn: torch.Tensor = self._given.sample((clients,))
            self._numbers = (key, drawn.tolist())
        return self._numbers[1]
