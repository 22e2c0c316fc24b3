"""Federated averaging that reads its replies once and keeps one mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from lightning_fed.values.running_mean import RunningMean
from lightning_fed.values.weights import Weights
from lightning_fed.wire import messages


class WeightedMean(FedAvg):
    """FedAvg (McMahan et al. 2017, Algorithm 1) with a running mean in float64.

    Flower's own FedAvg keeps all replies of a round and averages in their dtype; this one holds one mean, whatever the
    size of the cohort, and one client's mean is that client bit for bit.

    Args:
        uniform: Give every client the same coefficient instead of its number of examples.
        **kwargs: As Flower's ``FedAvg`` takes them; ``min_*_nodes`` are 1 here, not 2.
    """

    def __init__(self, *, uniform: bool = False, **kwargs: Any) -> None:
        minimums = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
        super().__init__(**{**minimums, **kwargs})
        self.uniform = uniform
        self._weights: Weights = {}
        self._own = {stage: kwargs.get(f"{stage}_metrics_aggr_fn") for stage in ("train", "evaluate")}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Do as Flower's ``FedAvg``, and remember the weights that the round starts from."""
        self._weights = messages.unpack(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the weighted means of the replies' arrays and metrics; ``(None, None)`` without a good reply."""
        mean, metrics = RunningMean(self._weights), RunningMetrics(self.weighted_by_key, self._own["train"])
        for reply in replies:
            if reply.has_error():
                continue
            coefficient = messages.num_examples(reply, self.weighted_by_key)
            arrays = messages.first(reply.content, ArrayRecord)
            assert arrays is not None
            self.take(mean, reply.metadata.src_node_id, messages.unpack(arrays), 1.0 if self.uniform else coefficient)
            metrics.add(reply, coefficient)
            # The next client trains while the iterator moves on: keep nothing of this one meanwhile.
            del reply, arrays
        if not mean.total:
            return None, None
        new = self.finish(mean)
        self._weights = {}
        return messages.pack(new), metrics.value()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the means of the metrics, each over the clients that report it; ``None`` without a good reply."""
        metrics = RunningMetrics(self.weighted_by_key, self._own["evaluate"])
        for reply in replies:
            if not reply.has_error():
                metrics.add(reply, messages.num_examples(reply, self.weighted_by_key))
        return metrics.value() if metrics.total else None

    def take(self, mean: RunningMean, node_id: int, weights: Weights, coefficient: float) -> None:
        """Take one client's weights into the round's mean."""
        mean.add(weights, coefficient)

    def finish(self, mean: RunningMean) -> Weights:
        """Return what becomes of the round's mean, now that all replies are in it."""
        return self.apply_mean(mean.value())

    def apply_mean(self, mean: Weights) -> Weights:
        """Return what becomes of the clients' mean; the mean itself here."""
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Return what must be in a checkpoint for the run to go on as if never interrupted."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""


class RunningMetrics:
    """Example-weighted means of numbers by name, each over those clients that report it.

    Args:
        key: The name of the coefficient among the numbers.
        own: The user's function of all replies' metrics and the key, in place of the means.
    """

    def __init__(self, key: str, own: Callable[[list[RecordDict], str], MetricRecord] | None) -> None:
        self.total = 0.0
        self._key, self._own = key, own
        self._kept: list[RecordDict] = []
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, reply: Message, coefficient: float) -> None:
        """Take one client's numbers in."""
        self.total += coefficient
        if self._own is not None:
            self._kept.append(RecordDict({k: r for k, r in reply.content.items() if isinstance(r, MetricRecord)}))
            return
        for name, value in messages.reply_scalars(reply, self._key).items():
            total, weight = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = total + value * coefficient, weight + coefficient

    def value(self) -> MetricRecord:
        """Return the means."""
        if self._own is not None:
            return self._own(self._kept, self._key)
        return MetricRecord({name: total / weight for name, (total, weight) in self._sums.items() if weight})
