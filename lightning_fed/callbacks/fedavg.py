"""Federated averaging."""

from __future__ import annotations

from flwr.serverapp.strategy import Strategy

from lightning_fed.callbacks.base import Averaging, Weighting
from lightning_fed.errors import ConfigurationError, require
from lightning_fed.strategies import MomentumMean
from lightning_fed.values import by_round
from lightning_fed.values.by_round import ByRound


class FedAvg(Averaging):
    """The new weights are the clients' weighted mean (McMahan et al. 2017, https://arxiv.org/abs/1602.05629).

    ``x = sum_k (n_k / n) w_k``, Algorithm 1. It is what runs when no callback decides the aggregation.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[FedAvg(weighting="uniform")])
    """


def require_rate(owner: object, learning_rate: ByRound) -> None:
    """Check a server's learning rate, which may change from round to round.

    Raises:
        ConfigurationError: If a number that is given is not > 0; what a function gives is looked at in its round.
    """
    positive = (lambda number: number > 0, "> 0")
    if by_round.changes(learning_rate) and not isinstance(learning_rate, (str, type)):
        if faults := by_round.faults("learning_rate", learning_rate, *positive):
            raise ConfigurationError(f"{type(owner).__name__}: {faults[0]}.")
    else:
        require(owner, learning_rate=(learning_rate, *positive))


class FedAvgM(Averaging):
    """FedAvg with server momentum (Hsu et al. 2019, https://arxiv.org/abs/1909.06335).

    ``v = momentum * v + (x - mean); x = x - learning_rate * v`` on parameters; buffers take the mean.

    Args:
        learning_rate: The server's learning rate, > 0; a list with one for each round, of which the last goes on, or a
            function of the round (from 1).
        momentum: In ``[0, 1)``.
        weighting: As in ``FedAvg``.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[FedAvgM(momentum=0.5)])
    """

    def __init__(self, learning_rate: ByRound = 1.0, momentum: float = 0.9, weighting: Weighting = "examples") -> None:
        super().__init__(weighting)
        require_rate(self, learning_rate)
        require(self, momentum=(momentum, lambda number: 0 <= number < 1, "in [0, 1)"))
        self.learning_rate, self.momentum = learning_rate, momentum

    def server_strategy(self, strategy: Strategy | None) -> Strategy:
        """Return the weighted mean with momentum."""
        return MomentumMean(learning_rate=self.learning_rate, momentum=self.momentum, uniform=self.uniform)
