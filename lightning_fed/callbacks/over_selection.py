"""Asks more clients than a round needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_fed import checks
from lightning_fed.callbacks.base import Stage
from lightning_fed.callbacks.by_clock import GoesByClock
from lightning_fed.callbacks.participation import PartialParticipation
from lightning_fed.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer


class OverSelection(GoesByClock, PartialParticipation):
    """Asks more clients than a round needs, and takes those who are first by the virtual clock of ``DeviceSpeed``.

    Bonawitz et al. 2019 ask 1.3 times as many (https://arxiv.org/abs/1902.01046). Of ``fraction_train * n`` clients
    that a round needs, ``factor`` times as many are sampled, and the slowest of them do not train: what they keep is as
    before. The round lasts as long as the slowest of those who count, or to a ``Deadline`` beside it. ``late/clients``
    is logged, of both together; ``late`` tells who it was in the last round. A client that fails is not replaced by one
    that was left out.

    Args:
        fraction_train: The part of the clients whose replies a round needs.
        factor: How many times as many are asked, rounded up, at least 1.
        **kwargs: As ``PartialParticipation``.

    Raises:
        ConfigurationError: If an argument is out of its range.

    >>> from lightning_fed import FederatedTrainer
    >>> from lightning_fed.callbacks import DeviceSpeed
    >>> callbacks = [DeviceSpeed(lambda round, client: 0.1 * (1 + client)), OverSelection(fraction_train=0.1)]
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=100, callbacks=callbacks)
    """

    def __init__(self, fraction_train: Any = 1.0, factor: float = 1.3, **kwargs: Any) -> None:
        PartialParticipation.__init__(self, fraction_train, **kwargs)
        GoesByClock.__init__(self)
        if not (checks.is_number(factor) and 1 <= factor < math.inf):
            raise ConfigurationError(f"OverSelection(factor={factor!r}) must be a number of at least 1.")
        self.factor = factor

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """See the base classes."""
        PartialParticipation.on_federation_start(self, trainer)
        GoesByClock.on_federation_start(self, trainer)

    def asked(self, stage: Stage, size: int) -> int:
        """Return how many are asked where ``size`` are needed."""
        return math.ceil(size * self.factor - 1e-9) if stage == "train" else size

    def in_time(self, trainer: FederatedTrainer, round: int, cohort: Sequence[int]) -> Sequence[int]:
        """Return those who are first; of two who take as long the one with the smaller number."""
        clock = self.clock(trainer)
        took = {client: clock.planned(round, client) for client in cohort}
        needed = self.size("train", trainer.num_clients, round)
        first = sorted(cohort, key=lambda client: (took[client], client))[:needed]
        self.late = {client: took[client] for client in cohort if client not in first}
        if len(first) == needed:  # a Deadline that has let somebody go may have set an end: nobody waits for it
            clock.ends_by(round, clock.now + max(map(took.__getitem__, first)))
        return sorted(first)
