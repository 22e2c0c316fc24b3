"""Federated averaging."""

from __future__ import annotations

from flwr.serverapp.strategy import Strategy

from lightning_fed.callbacks.base import Averaging, Weighting
from lightning_fed.errors import require
from lightning_fed.strategies import MomentumMean


class FedAvg(Averaging):
    """The new weights are the clients' weighted mean (McMahan et al. 2017, https://arxiv.org/abs/1602.05629).

    ``x = sum_k (n_k / n) w_k``, Algorithm 1. It is what runs when no callback decides the aggregation.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[FedAvg(weighting="uniform")])
    """


class FedAvgM(Averaging):
    """FedAvg with server momentum (Hsu et al. 2019, https://arxiv.org/abs/1909.06335).

    ``v = momentum * v + (x - mean); x = x - learning_rate * v`` on parameters; buffers take the mean.

    Args:
        learning_rate: The server's learning rate, > 0.
        momentum: In ``[0, 1)``.
        weighting: As in ``FedAvg``.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[FedAvgM(momentum=0.5)])
    """

    def __init__(self, learning_rate: float = 1.0, momentum: float = 0.9, weighting: Weighting = "examples") -> None:
        super().__init__(weighting)
        require(self, learning_rate=(learning_rate, lambda number: number > 0, "> 0"))
        require(self, momentum=(momentum, lambda number: 0 <= number < 1, "in [0, 1)"))
        self.learning_rate, self.momentum = learning_rate, momentum

    def server_strategy(self, strategy: Strategy | None) -> Strategy:
        """Return the weighted mean with momentum."""
        return MomentumMean(learning_rate=self.learning_rate, momentum=self.momentum, uniform=self.uniform)
