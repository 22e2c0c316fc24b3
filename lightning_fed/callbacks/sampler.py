"""Participation by a function of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

import numpy as np

from lightning_fed import checks
from lightning_fed.callbacks.availability import Available, require_there, table_of, who_is_there
from lightning_fed.callbacks.base import CohortOwner, Stage
from lightning_fed.errors import ConfigurationError
from lightning_fed.seeding import seed_for

Sampler = Callable[[int, list[int], np.random.Generator], Iterable[int]]


class Participation(CohortOwner):
    """Lets a function say who takes part in each round.

    The function is called with the round (from 1), the clients that are available, ascending, and a generator seeded
    from ``(seed, round)``; it gives the cohort, in any order. It is asked twice, and has to say the same: what draws
    from elsewhere, or counts its calls, would choose otherwise after a resume.

    Args:
        sampler: Says who trains.
        sampler_evaluate: Says who evaluates the new weights, maybe nobody; ``None`` for all that are available.
        available: Which clients are there, as in ``PartialParticipation``.
        min_available_clients: The run does not start with fewer clients than this.

    Raises:
        ConfigurationError: If an argument is of the wrong kind.

    >>> def two_neighbours(round, clients, generator):
    ...     first = int(generator.integers(len(clients)))
    ...     return [clients[first], clients[(first + 1) % len(clients)]]
    >>> Participation(two_neighbours).sample("train", round=1, num_clients=10, seed=0)
    [0, 9]
    """

    def __init__(
        self,
        sampler: Sampler,
        sampler_evaluate: Sampler | None = None,
        available: Available | None = None,
        min_available_clients: int = 1,
    ) -> None:
        given = {"sampler": sampler, "sampler_evaluate": sampler_evaluate}
        faults = [
            f"{name}={checks.as_typed(value)}: write a function of a round, the clients and a generator"
            for name, value in given.items()
            if not (callable(value) or (value is None and name == "sampler_evaluate"))
        ]
        self.available, no_table = table_of(available)
        if not (checks.is_number(min_available_clients, whole=True) and min_available_clients >= 1):
            faults.append(f"min_available_clients={min_available_clients!r} must be at least 1")
        if faults := faults + no_table:
            raise ConfigurationError(f"Participation: {'; '.join(faults)}.")
        self.sampler, self.sampler_evaluate = sampler, sampler_evaluate
        self.min_available_clients = min_available_clients

    @property
    def varies(self) -> bool:
        """See ``CohortOwner``: who knows."""
        return True

    def size(self, stage: Stage, num_clients: int) -> int:
        """Return how many clients would take part in a stage of the first round of a run with seed 0.

        Raises:
            ConfigurationError: If there are fewer clients than ``min_available_clients``.
        """
        if self.min_available_clients > num_clients:
            raise ConfigurationError(
                f"Participation(min_available_clients={self.min_available_clients}) asks for more clients than there"
                f" are: {num_clients}. Lower min_available_clients, or raise num_clients."
            )
        return len(self.sample(stage, 1, num_clients, 0))

    def sample(self, stage: Stage, round: int, num_clients: int, seed: int) -> list[int]:
        """Return the cohort of a round: client indices, ascending.

        Raises:
            ConfigurationError: If the function gives no such cohort, or not the same if it is asked again.
            RoundError: If no client is available to train, or none is chosen to.
        """
        clients = list(who_is_there("Participation", self.available, round, num_clients))
        sampler = self.sampler if stage == "train" else self.sampler_evaluate
        require_there(stage, round, len(clients), num_clients, (stage == "train", None))
        if sampler is None:
            return clients
        name = "sampler" if stage == "train" else "sampler_evaluate"
        seed = seed_for(seed, f"cohort/{stage}", round=round)
        cohort, again = (
            _checked(name, round, clients, sampler(round, list(clients), np.random.default_rng(seed))) for _ in range(2)
        )
        if cohort != again:
            raise ConfigurationError(
                f"Participation({name}=...) chose {cohort} in round {round} and, asked again, {again}: draw from the"
                " generator that it gets, and keep nothing from call to call, or a resumed run has other cohorts."
            )
        return cohort


def _checked(name: str, round: int, clients: list[int], given: Any) -> list[int]:
    """Return what a sampler gave as a list, ascending.

    Raises:
        ConfigurationError: If it is no cohort.
    """
    say = f"Participation({name}=...) gave {{}} in round {round}: it gives some of the clients that it gets, each once"
    if given is None or isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigurationError(say.format(checks.as_typed(given)) + ".")
    cohort = given.tolist() if hasattr(given, "tolist") else list(given)
    there = set(clients)
    strange = [one for one in cohort if isinstance(one, bool) or not isinstance(one, Integral) or one not in there]
    if strange:
        raise ConfigurationError(say.format(strange[:10]) + f"; there are {len(clients)}.")
    if twice := sorted({one for one in cohort if cohort.count(one) > 1}) if len(set(cohort)) < len(cohort) else []:
        raise ConfigurationError(say.format(f"client {', '.join(map(str, twice[:10]))} twice") + ".")
    return sorted(int(one) for one in cohort)
