"""FedBuff: asynchronous training with a buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_fed.callbacks.asynchronous import Asynchronous, Discount, wide
from lightning_fed.callbacks.base import Averaging, FederatedCallback
from lightning_fed.callbacks.fedavg import FedAvgM
from lightning_fed.errors import ConfigurationError, require
from lightning_fed.values.weights import Weights

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer


class FedBuff(Asynchronous):
    """The server updates whenever ``buffer_size`` replies are in (Nguyen et al. 2022, Algorithm 1).

    https://arxiv.org/abs/2106.06639. ``concurrency`` clients train all the time, each from the weights that are current
    when it begins. ``x = x + eta / K sum_i s(tau_i) (y_i - x_i)`` on parameters, ``x_i`` what client ``i`` began with,
    ``tau_i`` the updates since then, ``s(tau) = (1 + tau) ** -discount``; buffers take the mean of the ``y_i``. Clients
    come and go by the clock of ``DeviceSpeed``, drawn at random from those that are idle; whose reply is in the buffer
    waits for the update. A round is an update; a client that fails has no part in it.

    All clients weigh alike. Another aggregation among the callbacks decides that itself, and takes the mean as its
    pseudo-gradient: ``FedAdam(weighting="uniform")``.

    ``staleness/mean``, ``staleness/max``, ``versions/live`` (of the weights at work) and, with ``max_staleness``,
    ``staleness/dropped`` are logged.

    Args:
        concurrency: How many clients train at once.
        buffer_size: ``K``, how many replies an update takes, at most ``concurrency``.
        discount: The exponent of ``s``, or a function of ``tau`` that gives a number in ``[0, 1]``.
        server_learning_rate: ``eta``, > 0; 1 beside another aggregation, which has a learning rate of its own.
        max_staleness: Replies with a greater ``tau`` are dropped, and their clients keep what they kept; ``None`` for
            none.
        fraction_evaluate: The part of the clients that evaluates the new weights, as in ``PartialParticipation``.

    Raises:
        ConfigurationError: If an argument is out of its range.

    >>> from torch.distributions import HalfNormal
    >>> from lightning_fed import FederatedTrainer
    >>> from lightning_fed.callbacks import DeviceSpeed
    >>> callbacks = [DeviceSpeed(HalfNormal(0.05)), FedBuff(concurrency=20, buffer_size=5)]
    >>> trainer = FederatedTrainer(max_rounds=100, num_clients=50, callbacks=callbacks)
    """

    def __init__(
        self,
        concurrency: int,
        buffer_size: int = 10,
        discount: Discount = 0.5,
        server_learning_rate: float = 1.0,
        max_staleness: int | None = None,
        fraction_evaluate: float = 1.0,
    ) -> None:
        super().__init__(concurrency, buffer_size, discount, max_staleness, fraction_evaluate)
        require(self, server_learning_rate=(server_learning_rate, lambda number: number > 0, "> 0"))
        self.server_learning_rate = server_learning_rate

    def aggregation(self) -> Averaging:
        """Return the aggregation where no callback decides it."""
        if self.server_learning_rate == 1:
            return super().aggregation()
        return FedAvgM(learning_rate=self.server_learning_rate, momentum=0.0, weighting="uniform")

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Do as the base class, and check that ``eta`` is not left out.

        Raises:
            ConfigurationError: If it is.
        """
        super().on_federation_start(trainer)
        methods = [callback for callback in trainer.callbacks if isinstance(callback, FederatedCallback)]
        others = [type(method).__name__ for method in methods if "aggregation" in method.decides]
        if others and self.server_learning_rate != 1:
            raise ConfigurationError(
                f"FedBuff(server_learning_rate={self.server_learning_rate}) is not used beside {others[0]}, which"
                " decides the aggregation. Leave it out, and say the learning rate there, as in"
                f" FedAvgM(learning_rate={self.server_learning_rate}, momentum=0.0, weighting='uniform')."
            )

    def moved(self, trained: Weights, begin: Weights, weights: Weights, staleness: int, discount: float) -> Weights:
        """Return the global weights, moved by the client's discounted change."""
        if not staleness and discount == 1:
            return trained
        moved = dict(trained)
        for name in self._moving & trained.keys():
            y = trained[name]
            wide_y, before = wide(y, y.device), wide(begin[name], y.device)
            # Of an infinity, such as a mask's, that is as it was there is no difference.
            change = (wide_y - before).masked_fill_(wide_y == before, 0)
            moved[name] = wide(weights[name], y.device) + discount * change
        return moved
