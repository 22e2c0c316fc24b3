"""FedAsync: asynchronous training, one reply at a time."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fed.callbacks.asynchronous import Asynchronous, Discount, wide
from lightning_fed.errors import require
from lightning_fed.values.weights import Weights


@dataclass(frozen=True)
class Hinge:
    """``FedAsync.hinge``: an object, which can be sent, and whose numbers a resumed run compares."""

    a: float
    b: float

    def __call__(self, staleness: int) -> float:
        """Return what a reply counts."""
        return 1.0 if staleness <= self.b else 1.0 / (self.a * (staleness - self.b) + 1.0)


class FedAsync(Asynchronous):
    """The server mixes in each reply as it arrives (Xie et al. 2019, Algorithm 1).

    https://arxiv.org/abs/1903.03934. ``x = (1 - alpha s(tau)) x + alpha s(tau) y``, ``tau`` the updates since the
    client began, ``s(tau) = (1 + tau) ** -discount``. Clients come and go by the clock of ``DeviceSpeed``, drawn at
    random from those that are idle. Integer and bool buffers are the client's. A round is an update, and one reply.
    What is logged is as for ``FedBuff``. The paper's proximal term is ``FedProx`` beside it.

    Args:
        concurrency: How many clients train at once.
        alpha: How much of a fresh reply is mixed in, in ``(0, 1]``.
        discount: The exponent of ``s``, 0 for none, or a function of ``tau`` that gives a number in ``[0, 1]``: the
            paper's hinge is ``hinge(a, b)``.
        max_staleness: Replies with a greater ``tau`` are dropped, and their clients keep what they kept; ``None`` for
            none.
        fraction_evaluate: The part of the clients that evaluates the new weights, as in ``PartialParticipation``.

    Raises:
        ConfigurationError: If an argument is out of its range.

    >>> from lightning_fed import FederatedTrainer
    >>> from lightning_fed.callbacks import DeviceSpeed
    >>> callbacks = [DeviceSpeed([0.1, 0.2, 0.9]), FedAsync(concurrency=3, discount=FedAsync.hinge(a=10, b=4))]
    >>> trainer = FederatedTrainer(max_rounds=30, num_clients=3, callbacks=callbacks)
    """

    def __init__(
        self,
        concurrency: int,
        alpha: float = 0.6,
        discount: Discount = 0.5,
        max_staleness: int | None = None,
        fraction_evaluate: float = 1.0,
    ) -> None:
        super().__init__(concurrency, 1, discount, max_staleness, fraction_evaluate)
        require(self, alpha=(alpha, lambda number: 0 < number <= 1, "in (0, 1]"))
        self.alpha = alpha

    @staticmethod
    def hinge(a: float = 10.0, b: float = 4.0) -> Hinge:
        """Return ``s(tau) = 1`` up to ``b``, and ``1 / (a (tau - b) + 1)`` beyond."""
        return Hinge(a, b)

    def moved(self, trained: Weights, begin: Weights, weights: Weights, staleness: int, discount: float) -> Weights:
        """Return the global weights, mixed with the client's."""
        part = self.alpha * discount
        if part in (0, 1):
            return {name: y if part else weights[name] for name, y in trained.items()}
        return {
            name: (1 - part) * wide(weights[name], y.device) + part * wide(y, y.device) for name, y in trained.items()
        }
