"""The spread of metrics over clients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_fed.callbacks.base import CLIENT_METRICS, ClientReport, FederatedCallback, Stage

if TYPE_CHECKING:
    from lightning_fed.trainer import FederatedTrainer


class ClientMetrics(FederatedCallback):
    """Logs the least and the greatest of each metric over the round's clients, and on request every client's value.

    As ``<name>/min`` and ``<name>/max`` for training, ``clients/<name>/min`` and so on for the clients' own evaluation;
    every client's value as ``<name>/client_3``. They can be monitored like any other metric. A client whose value is
    NaN has no part in the spread; where all are NaN, so is the spread.

    Args:
        spread: Log minimum and maximum.
        per_client: Log every client's value; meant for few clients.

    >>> from lightning_fed import FederatedTrainer
    >>> trainer = FederatedTrainer(max_rounds=1, num_clients=3, callbacks=[ClientMetrics(per_client=True)])
    """

    def __init__(self, spread: bool = True, per_client: bool = False) -> None:
        self.spread, self.per_client = spread, per_client
        self._values: dict[str, dict[int, float]] = {}

    def on_federation_start(self, trainer: FederatedTrainer) -> None:
        """Forget a round that broke off."""
        self._values = {}

    def on_client_end(self, trainer: FederatedTrainer, round: int, stage: Stage, report: ClientReport) -> None:
        """Collect a client's values."""
        prefix = CLIENT_METRICS if stage == "evaluate" else ""
        for name, value in report.metrics.items():
            self._values.setdefault(prefix + name, {})[report.client] = value

    def on_round_end(self, trainer: FederatedTrainer, round: int, metrics: dict[str, float]) -> None:
        """Add to what is logged."""
        for name, values in self._values.items():
            if self.spread:
                numbers = [value for value in values.values() if not math.isnan(value)] or [math.nan]
                metrics[f"{name}/min"], metrics[f"{name}/max"] = min(numbers), max(numbers)
            if self.per_client:
                metrics.update({f"{name}/client_{client}": value for client, value in sorted(values.items())})
        self._values = {}
