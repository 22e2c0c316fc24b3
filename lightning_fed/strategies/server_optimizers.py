"""Server optimizers: the clients' mean update is a pseudo-gradient.

Reddi et al. 2021, *Adaptive Federated Optimization* (https://arxiv.org/abs/2003.00295), Algorithm 2, and Hsu et al.
2019, *Measuring the Effects of Non-Identical Data Distribution* (https://arxiv.org/abs/1909.06335), section 3.

Only parameters are stepped; floating buffers (BatchNorm's statistics) take the plain mean.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from lightning_fed.strategies.mean import WeightedMean
from lightning_fed.values import by_round
from lightning_fed.values.by_round import ByRound
from lightning_fed.values.weights import Weights
from lightning_fed.wire.fingerprint import describe


class ServerOptimizer(WeightedMean):
    """The base: keeps the round's weights ``x`` and replaces each parameter's mean by ``step(x, mean - x)``.

    Attributes:
        parameters: The names to step; ``None`` steps every array, for plain Flower without buffers.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parameters: Collection[str] | None = None
        self.moments: dict[str, Weights] = {}

    def apply_mean(self, mean: Weights) -> Weights:
        """Step the parameters, and leave buffers at their mean."""
        stepped = {}
        for name, value in mean.items():
            if self.parameters is not None and name not in self.parameters:
                stepped[name] = value
                continue
            # Half precision cannot hold a second moment: the step is made in float32 at least.
            wide = torch.promote_types(value.dtype, torch.float32)
            x = self._weights[name].to(device=value.device, dtype=wide)
            stepped[name] = self.step(name, x, value.to(wide) - x).to(value.dtype)
        return stepped

    @abstractmethod
    def step(self, name: str, x: Tensor, delta: Tensor) -> Tensor:
        """Return the new value of one parameter.

        Args:
            name: The parameter's name, under which its moments are kept.
            x: Its value at the start of the round.
            delta: The clients' mean minus ``x``, same shape and dtype.
        """

    def moment(self, kind: str, name: str, like: Tensor, initial: float = 0.0) -> Tensor:
        """Return a parameter's running moment, not to be written to; ``initial`` everywhere at first."""
        kept = self.moments.get(kind, {}).get(name)
        return torch.full_like(like, initial) if kept is None else kept.to(like.device)

    def keep(self, kind: str, name: str, moment: Tensor) -> Tensor:
        """Keep a moment's new value for the next round, and return it."""
        self.moments.setdefault(kind, {})[name] = moment
        return moment

    def state_dict(self) -> dict[str, Any]:
        """Return the moments by kind and name. Steps replace tensors and never write into them: nothing is copied."""
        return {"moments": {kind: dict(store) for kind, store in self.moments.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.moments = {k: {n: t.clone() for n, t in store.items()} for k, store in state["moments"].items()}


class SteppedMean(ServerOptimizer):
    """The base of those with a learning rate, which may change from round to round.

    Args:
        learning_rate: The server's learning rate, > 0; a list with one for each round, of which the last goes on, or a
            function of the round (from 1).
        **kwargs: As ``WeightedMean``.

    Attributes:
        rate: That of the present round.
    """

    rate: float

    def __init__(self, *, learning_rate: ByRound, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.learning_rate = learning_rate

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Do as ``WeightedMean``, with the learning rate of the round.

        Raises:
            ConfigurationError: If a function gives none.
        """
        call = f"{type(self).__name__}(learning_rate={describe(self.learning_rate)})"
        self.rate = by_round.at(call, self.learning_rate, server_round, lambda number: number > 0, "> 0")
        return super().aggregate_train(server_round, replies)


class MomentumMean(SteppedMean):
    """FedAvgM: ``v = momentum * v - delta; x = x - lr * v`` (Hsu et al. 2019, section 3: server momentum).

    Args:
        learning_rate: The server's learning rate: a number, a list by round, or a function of the round.
        momentum: The server's momentum, in ``[0, 1)``.
        **kwargs: As ``WeightedMean``.
    """

    def __init__(self, *, learning_rate: ByRound, momentum: float, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.momentum = momentum

    def step(self, name: str, x: Tensor, delta: Tensor) -> Tensor:
        """See the class."""
        velocity = self.keep("velocity", name, self.moment("velocity", name, x) * self.momentum - delta)
        return x - self.rate * velocity


class AdaptiveMean(SteppedMean):
    """The shared part of Algorithm 2: ``m = beta_1 m + (1 - beta_1) delta; x = x + lr m / (sqrt(v) + tau)``.

    ``m`` starts at 0 and ``v`` at ``tau ** 2``, the least that the algorithm allows; there is no bias correction.

    Args:
        learning_rate: The server's learning rate (eta): a number, a list by round, or a function of the round.
        beta_1: Decay of the first moment, in ``[0, 1)``.
        tau: The degree of adaptivity, > 0.
        **kwargs: As ``WeightedMean``.
    """

    def __init__(self, *, learning_rate: ByRound, beta_1: float, tau: float, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.beta_1, self.tau = beta_1, tau

    def step(self, name: str, x: Tensor, delta: Tensor) -> Tensor:
        """See the class."""
        m = self.keep("m", name, (self.moment("m", name, x) * self.beta_1).add_(delta, alpha=1 - self.beta_1))
        squared = (delta * delta.conj()).real if delta.is_complex() else delta * delta
        v = self.keep("v", name, self.second_moment(self.moment("v", name, squared, self.tau**2), squared))
        return x + self.rate * m / (v.sqrt() + self.tau)

    @abstractmethod
    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """Return the new ``v``, from ``squared = |delta| ** 2``, both real also where the parameter is complex."""


class AdagradMean(AdaptiveMean):
    """FedAdagrad: ``v = v + delta ** 2``."""

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """See the class."""
        return v + squared


class AdamMean(AdaptiveMean):
    """FedAdam: ``v = beta_2 v + (1 - beta_2) delta ** 2``.

    Args:
        beta_2: Decay of the second moment, in ``[0, 1)``.
        **kwargs: As ``AdaptiveMean``.
    """

    def __init__(self, *, beta_2: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta_2 = beta_2

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """See the class."""
        return (v * self.beta_2).add_(squared, alpha=1 - self.beta_2)


class YogiMean(AdamMean):
    """FedYogi: ``v = v - (1 - beta_2) delta ** 2 sign(v - delta ** 2)``."""

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        """See the class."""
        return v.sub(squared * (v - squared).sign(), alpha=1 - self.beta_2)
