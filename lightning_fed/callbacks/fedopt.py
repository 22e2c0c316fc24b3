"""FedAdagrad, FedAdam and FedYogi (Reddi et al. 2021, https://arxiv.org/abs/2003.00295, Algorithm 2).

The server steps the parameters with the clients' mean update as a pseudo-gradient; buffers take the mean. The moments
are part of the checkpoint. Defaults are those of the paper's section 5 (beta_1 0.9, beta_2 0.99, tau 1e-3).
"""

from __future__ import annotations

from flwr.serverapp.strategy import Strategy

from lightning_fed.callbacks.base import Averaging, Weighting
from lightning_fed.callbacks.fedavg import require_rate
from lightning_fed.errors import require
from lightning_fed.strategies import AdagradMean, AdamMean, YogiMean
from lightning_fed.values.by_round import ByRound


class FedAdagrad(Averaging):
    """Server Adagrad: ``v = v + delta^2``.

    Args:
        learning_rate: The server's learning rate (eta), > 0; a list with one for each round, of which the last goes on,
            or a function of the round (from 1).
        beta_1: Decay of the first moment, in ``[0, 1)``.
        tau: The degree of adaptivity, > 0.
        weighting: As in ``FedAvg``.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[FedAdagrad(learning_rate=0.03)])
    """

    def __init__(
        self,
        learning_rate: ByRound = 0.1,
        beta_1: float = 0.0,
        tau: float = 1e-3,
        weighting: Weighting = "examples",
    ) -> None:
        super().__init__(weighting)
        require_rate(self, learning_rate)
        require(
            self,
            beta_1=(beta_1, lambda number: 0 <= number < 1, "in [0, 1)"),
            tau=(tau, lambda number: number > 0, "> 0"),
        )
        self.learning_rate, self.beta_1, self.tau = learning_rate, beta_1, tau

    def server_strategy(self, strategy: Strategy | None) -> Strategy:
        """Return the mean with an Adagrad step."""
        return AdagradMean(learning_rate=self.learning_rate, beta_1=self.beta_1, tau=self.tau, uniform=self.uniform)


class FedAdam(FedAdagrad):
    """Server Adam without bias correction: ``v = beta_2 v + (1 - beta_2) delta^2``.

    Args:
        learning_rate: The server's learning rate (eta), > 0; a list with one for each round, of which the last goes on,
            or a function of the round (from 1).
        beta_1: Decay of the first moment, in ``[0, 1)``.
        beta_2: Decay of the second moment, in ``[0, 1)``.
        tau: The degree of adaptivity, > 0.
        weighting: As in ``FedAvg``.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[FedAdam(learning_rate=0.03)])
    """

    _strategy: type[AdamMean] = AdamMean

    def __init__(
        self,
        learning_rate: ByRound = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        weighting: Weighting = "examples",
    ) -> None:
        super().__init__(learning_rate, beta_1, tau, weighting)
        require(self, beta_2=(beta_2, lambda number: 0 <= number < 1, "in [0, 1)"))
        self.beta_2 = beta_2

    def server_strategy(self, strategy: Strategy | None) -> Strategy:
        """Return the mean with the optimizer's step."""
        return self._strategy(
            learning_rate=self.learning_rate,
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            tau=self.tau,
            uniform=self.uniform,
        )


class FedYogi(FedAdam):
    """Server Yogi: ``v = v - (1 - beta_2) delta^2 sign(v - delta^2)``; arguments as ``FedAdam``.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=10, num_clients=3, callbacks=[FedYogi(learning_rate=0.03)])
    """

    _strategy = YogiMean
