"""FedNova's mean: each client's update counts by how far its optimizer went."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from lightning_fed.strategies.server_optimizers import ServerOptimizer
from lightning_fed.values.running_mean import RunningMean
from lightning_fed.values.weights import Weights


@dataclass
class Progress:
    """How far a client's optimizer went in a round, in any unit that all clients have in common.

    Attributes:
        normalizer: ``a_i``, by which its update is divided.
        steps: What it counts for in the effective number of steps: ``a_i``, unless a proximal term holds it back.
    """

    normalizer: float
    steps: float


@dataclass
class _Round:
    """What is known of the clients so far. Normalizers are told in that of the first: equal ones are exactly 1."""

    buffers: RunningMean
    unit: float = 0.0
    examples: float = 0.0
    steps: float = 0.0


class NormalizedMean(ServerOptimizer):
    """``x + (sum_i p_i tau_i) sum_i p_i delta_i / a_i`` (Wang et al. 2020, equation 7), ``p_i`` by examples.

    It is the mean of the clients with weights ``p_i / a_i``, from which it goes on (or back) along the mean update.
    Where all ``a_i`` are equal that is FedAvg bit for bit. Buffers take the plain mean.

    Args:
        progress: How far each client went, by its node's id, which is there by the time that its reply is read, and
            taken out then.
        **kwargs: As ``WeightedMean``.
    """

    def __init__(self, progress: dict[int, Progress], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.progress = progress
        self._round = _Round(RunningMean())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Do as ``WeightedMean``, and begin to count."""
        sent = super().configure_train(server_round, arrays, config, grid)
        self._round = _Round(RunningMean(self._weights))
        self.progress.clear()
        return sent

    def take(self, mean: RunningMean, node_id: int, weights: Weights, coefficient: float) -> None:
        """See ``WeightedMean``."""
        round, progress = self._round, self.progress.pop(node_id)
        round.unit = round.unit or progress.normalizer
        trained = weights if self.parameters is None else {n: w for n, w in weights.items() if n in self.parameters}
        round.buffers.add({name: w for name, w in weights.items() if name not in trained}, coefficient)
        mean.add(trained, coefficient * (round.unit / progress.normalizer))
        round.examples += coefficient
        round.steps += coefficient * (progress.steps / round.unit)

    def finish(self, mean: RunningMean) -> Weights:
        """See ``WeightedMean``."""
        round = self._round
        self._factor = (round.steps / round.examples) * (mean.total / round.examples)
        trained = mean.value()
        new = {**round.buffers.value(), **(trained if self._factor == 1 else self.apply_mean(trained))}
        self._round = _Round(RunningMean())
        return {name: new[name] for name in self._weights}

    def step(self, name: str, x: Tensor, delta: Tensor) -> Tensor:
        """See the class."""
        return x + self._factor * delta
